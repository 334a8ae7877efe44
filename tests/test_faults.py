"""What goes wrong while a model is pruned: nothing is half-written, and nothing is lost."""

import dataclasses
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import stat
import time
import types
from pathlib import Path

import killed
import numpy as np
import pytest
from killed import on_change
from safetensors.numpy import save_file
from tiny import write_tiny

from prox24._checkpoints import safetensors_file, unfinished, writer
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.unfinished import check_unchanged, source_files, unfinished_folder
from prox24._cli.main import main
from prox24._jobs import forward, prune
from prox24.errors import CheckpointError, DiskError

TEXT = "Calibration text for a model that reads bytes. " * 60
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
BEGUN = 5


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A model and a text, the same with a pruned model, and the same with half of one."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "given").mkdir()
    write_tiny(folder / "given" / "model", dtype="bfloat16")
    (folder / "given" / "text.txt").write_text(TEXT)
    for name in ("done", "begun"):
        shutil.copytree(folder / "given", folder / name)
    assert main(command(folder / "done")) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, BEGUN, KeyboardInterrupt)
        assert main(command(folder / "begun")) == 130
    return folder


@pytest.fixture
def workspace(template, tmp_path):
    return shutil.copytree(template / "given", tmp_path, dirs_exist_ok=True)


@pytest.fixture
def done(template, tmp_path):
    """With a pruned model."""
    return shutil.copytree(template / "done", tmp_path, dirs_exist_ok=True)


@pytest.fixture
def begun(template, tmp_path):
    """With five tensors of a pruned model."""
    return shutil.copytree(template / "begun", tmp_path, dirs_exist_ok=True)


@pytest.fixture
def whole(template):
    """The files of the pruned model."""
    return contents(template / "done" / "out")


def command(workspace, destination="out", *more, method="wanda"):
    options = ["--calibration", workspace / "text.txt", "--sequence-length", "32", "--samples", "8"]
    every = ["prune", workspace / "model", workspace / destination, "--method", method, *options]
    return [str(argument) for argument in [*every, "--quiet", *more]]


def in_shards(tmp_path):
    write_tiny(tmp_path / "model")
    given = [str(tmp_path / name) for name in ("model", "shards")]
    return ["convert", *given, "--shard-size", "20KB", "--quiet"]


def recorded(workspace):
    return len((workspace / "out.unfinished" / "journal.jsonl").read_text().splitlines())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights_of(path):
    return {name: source.read() for name, source in safetensors_file.open_file(path).items()}


def interrupt_after(monkeypatch, count, error):
    """Has the writing of the tensor after so many end with an error."""
    create_file = safetensors_file.create_file
    written = iter(range(count))

    @unfinished.contextlib.contextmanager
    def failing(path, specs):
        with create_file(path, specs) as put:

            def put_or_fail(name, values):
                if next(written, None) is None:
                    raise error
                put(name, values)

            yield put_or_fail

    monkeypatch.setattr(safetensors_file, "create_file", failing)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("llama1", ["--method", "admm", "--targets", "dense", "--shard-size", "20KB"]),
        ("gpt2", ["--activations", "disk", "--targets", "dense", "--dtype", "float16"]),
        ("mixtral", ["--method", "sparsegpt"]),
    ],
)
def test_a_run_that_goes_on_writes_the_same_bytes(tmp_path, monkeypatch, capsys, variant, options):
    write_tiny(tmp_path / "model", variant)
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(command(tmp_path, "whole", *options)) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7, KeyboardInterrupt)
        assert main(command(tmp_path, "out", *options)) == 130
    said = f"prox24: interrupted; what is done is in {tmp_path}/out.unfinished: "
    assert capsys.readouterr().err.startswith(said)
    assert not (tmp_path / "out").exists()
    report = tmp_path / "report.json"
    assert main(command(tmp_path, "out", *options, "--report", str(report))) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.unfinished").exists()
    resumed = json.loads(report.read_text())
    assert resumed["resumed_linears"] == 7
    names = [linear["name"] for linear in resumed["linears"]]
    assert len(names) == len(set(names)) > 7


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_hidden_states_on_disk_spare_the_finished_layers(workspace, monkeypatch, whole, place):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9, KeyboardInterrupt)  # in the second of two layers
        assert main(command(workspace, "out", "--activations", place)) == 130
    read = []
    layer_weights = forward.layer_weights
    monkeypatch.setattr(
        forward,
        "layer_weights",
        lambda model, index: read.append(index) or layer_weights(model, index),
    )
    assert main(command(workspace, "out", "--activations", place)) == 0
    assert read == ([0, 1] if place == "memory" else [1])
    assert contents(workspace / "out") == whole


@pytest.mark.parametrize(("left", "note"), [(100, None), (None, b"9"), (None, b"\xff")])
def test_hidden_states_that_were_lost_are_computed_again(workspace, monkeypatch, whole, left, note):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9, KeyboardInterrupt)
        assert main(command(workspace, "out", "--activations", "disk")) == 130
    folder = workspace / "out.unfinished" / "activations" / "0"
    if left is not None:
        os.truncate(folder / "pruned-1", left)
    if note is not None:
        (folder / "layer").write_bytes(note)
    # It begins anew, and does not come far.
    with monkeypatch.context() as patch:
        patch.setattr(forward, "run_into", interrupted)
        assert main(command(workspace, "out", "--activations", "disk")) == 130
    assert main(command(workspace, "out", "--activations", "disk")) == 0
    assert contents(workspace / "out") == whole


def interrupted(*arguments):
    raise KeyboardInterrupt


@pytest.fixture
def processes(tmp_path):
    """Starts the command line in processes."""
    context = killed.imported()
    started = []

    def start(arguments, place=None, number=signal.SIGKILL):
        cache, errors = str(tmp_path / "compiled"), str(tmp_path / "errors.txt")
        target = (arguments, cache, errors, place, 1, number)
        process = context.Process(target=killed.run, args=target)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_run_that_ends_at_any_place_ends_with_the_same_bytes(workspace, whole):
    """What a killed process leaves is what is on disk then, in one process with copies of it."""
    states = []

    def copy_state():
        if copying:
            copying.clear()
            state = workspace / "states" / str(len(states))
            for folder in workspace.glob("out*"):
                shutil.copytree(folder, state / folder.name)
            states.append(state)
            copying.append(True)

    copying = []
    (workspace / "states").mkdir()
    on_change(str(workspace / "out"), copy_state)
    copying.append(True)
    assert main(command(workspace)) == 0
    copying.clear()
    shutil.rmtree(workspace / "out")
    assert len(states) > 50
    resumed = 0
    # The first and the last changes, where folders come and go, and some between.
    for state in [*states[:3], *states[3:-4:12], *states[-4:]]:
        for folder in state.glob("out*") if state.exists() else []:
            folder.rename(workspace / folder.name)
        resumed += (workspace / "out.unfinished" / "model").exists()
        if not (workspace / "out").exists():
            assert main(command(workspace)) == 0
        assert contents(workspace / "out") == whole
        shutil.rmtree(workspace / "out")
        shutil.rmtree(workspace / "out.unfinished", ignore_errors=True)
    assert resumed > 4


@pytest.mark.slow  # beside one that is cut off at some places
def test_a_killed_run_ends_with_the_same_bytes(workspace, processes, whole):
    """PROX24_KILLS=50 kills as many processes, which takes minutes."""
    began = time.perf_counter()
    processes(command(workspace)).join()
    took = time.perf_counter() - began
    places = random.Random(0)
    for index in range(int(os.environ.get("PROX24_KILLS", "6"))):
        if (workspace / "out").exists():
            assert contents(workspace / "out") == whole
            shutil.rmtree(workspace / "out")
        if index % 2:  # at a change of a file, or at any time
            process = processes(command(workspace), places.randrange(1, 60))
        else:
            process = processes(command(workspace))
            process.join(places.uniform(0, took))
            process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
    process = processes([*command(workspace), "--overwrite"])
    process.join()
    assert process.exitcode == 0, (workspace / "errors.txt").read_text()
    assert contents(workspace / "out") == whole


def test_sigterm_ends_the_run_in_order(workspace, processes, whole):
    process = processes(command(workspace), 40, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert recorded(workspace)
    printed = (workspace / "errors.txt").read_text()
    said = f"ended by SIGTERM; what is done is in {workspace}/out.unfinished: "
    assert printed.startswith(f"prox24: {said}")
    assert not (workspace / "out").exists()
    assert main(command(workspace)) == 0
    assert contents(workspace / "out") == whole


def of_job(change):
    def edit(workspace):
        path = workspace / "out.unfinished" / "job.json"
        job = json.loads(path.read_text())
        change(job)
        path.write_text(json.dumps(job))

    return edit


def old_job(job):
    """Of a version that had no recipes."""
    job["versions"]["prox24"] = "0.1.0"
    job["arguments"] = job.pop("recipe")


def change_text(workspace):
    (workspace / "text.txt").write_text("Another " + TEXT)


def touch_source(workspace):
    os.utime(workspace / "model" / "model.safetensors", (0, 0))


def damage_tensor(workspace):
    path = workspace / "out.unfinished" / "model" / "model.safetensors"
    source = safetensors_file.open_file(path)[Q_PROJ].read()
    place = path.read_bytes().index(source.tobytes())
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\x17")


def damage_journal(workspace):
    path = workspace / "out.unfinished" / "journal.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:-9], *lines[3:], ""]))


def damage_job(workspace):
    path = workspace / "out.unfinished" / "job.json"
    path.write_text(path.read_text()[:-9])


def lose_job(workspace):
    (workspace / "out.unfinished" / "job.json").unlink()


DAMAGED = "is damaged; delete {work} to start anew"
OLDER = "{work} was begun by prox24 0.1.0; finish it with that version, or delete it to start anew"


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (change_text, [], 'calibration.sha256 was "'),
        (touch_source, [], "source.model.safetensors was ["),
        (None, ["--damping", "0.5"], "recipe.damping was 0.01, is 0.5"),
        (None, ["--method", "magnitude"], 'recipe.solver.name was "Wanda", is "Magnitude"'),
        (of_job(lambda job: job["versions"].update(jax="0.1")), [], 'versions.jax was "0.1", is'),
        (of_job(lambda job: job["versions"].update(prox24="0.1.0")), [], OLDER),
        (of_job(old_job), [], OLDER),
        (of_job(lambda job: job["devices"].append(7)), [], "devices was"),
        (of_job(lambda job: job.update(processes=3)), [], "processes was 3, is 1"),
        (damage_tensor, [], f"{Q_PROJ} is damaged; delete {{work}}"),
        (damage_journal, [], f"{{work}}/journal.jsonl {DAMAGED}"),
        (damage_job, [], f"{{work}}/job.json {DAMAGED}"),
        (lose_job, [], f"{{work}}/job.json {DAMAGED}"),
    ],
)
def test_another_run_is_refused_and_the_work_stays(begun, capsys, change, options, said):
    if change is not None:
        change(begun)
    before = contents(begun / "out.unfinished" / "model")
    assert main(command(begun, "out", *options)) == 2
    printed = capsys.readouterr().err
    assert said.replace("{work}", str(begun / "out.unfinished")) in printed
    assert printed.count("\n") == 1
    assert contents(begun / "out.unfinished" / "model") == before
    assert recorded(begun) == BEGUN


def test_what_the_journal_tells_of_is_on_disk_before(workspace, monkeypatch):
    """Also when the power fails: each file before the journal, all before the folder's name."""
    events = []
    fsync, rename = os.fsync, Path.rename

    def synchronised(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(path, target):
        events.append(f"{path.name} -> {Path(target).name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synchronised)
    monkeypatch.setattr(Path, "rename", renamed)
    assert main(command(workspace)) == 0
    told = [place for place, event in enumerate(events) if event == "journal.jsonl"]
    assert len(told) == 14
    assert {events[place - 1] for place in told} <= {"model.safetensors", "model.safetensors.new"}
    moved = events.index("model -> out")
    assert {"model.safetensors", "config.json", "prox24.json", "model"} <= {*events[:moved]}
    assert workspace.name in events[moved:]


def test_a_second_run_on_a_destination_is_refused(workspace, capsys):
    with unfinished_folder(workspace / "out"):
        assert main(command(workspace)) == 2
    assert capsys.readouterr().err == (
        f"prox24: error: another process is writing {workspace}/out\n"
    )


def test_a_full_disk_loses_nothing(workspace, monkeypatch, capsys, whole):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        assert main(command(workspace)) == 2
    printed = capsys.readouterr().err
    assert "No space left on device; what is done is in" in printed
    assert printed.count("\n") == 1
    assert main(command(workspace)) == 0
    assert contents(workspace / "out") == whole


def test_a_disk_that_is_still_full_loses_nothing(begun, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    monkeypatch.setattr(writer, "_allocated", lambda folder: 0)
    assert main(command(begun)) == 2
    assert "bytes do not fit; what is done is in" in capsys.readouterr().err
    assert recorded(begun) == BEGUN


def test_a_file_that_the_system_does_not_let_grow_loses_nothing(workspace, capsys, whole):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    half = len(whole["model.safetensors"]) // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, before[1]))
    try:
        assert main(command(workspace)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "model.safetensors: File too large" in capsys.readouterr().err
    assert not (workspace / "out").exists()
    assert main(command(workspace)) == 0
    assert contents(workspace / "out") == whole


def test_what_is_done_outlives_a_journal_that_cannot_be_read(begun, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert main(command(begun)) == 2
    assert recorded(begun) == BEGUN


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such call here")
def test_activations_that_do_not_fit_the_disk_are_named(workspace, monkeypatch, capsys):
    def full(descriptor, start, size):
        assert size == 8 * 32 * 32 * 4
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert main(command(workspace, "out", "--activations", "disk")) == 2
    assert "activations/0/pruned-0: No space left on device" in capsys.readouterr().err


def test_a_file_system_that_gives_no_place_before_is_taken_as_it_is(workspace, monkeypatch):
    def unsupported(descriptor, start, size):
        assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    assert main(command(workspace, "out", "--activations", "disk")) == 0


def test_what_came_to_stand_at_the_destination_is_kept(workspace, monkeypatch, capsys, whole):
    fill_folder = prune.fill_folder

    def meanwhile(*arguments, **keywords):
        (workspace / "out").mkdir()
        (workspace / "out" / "precious").write_text("x")
        return fill_folder(*arguments, **keywords)

    monkeypatch.setattr(prune, "fill_folder", meanwhile)
    assert main(command(workspace)) == 2
    printed = capsys.readouterr().err
    assert f"{workspace}/out came to exist meanwhile; the result is {workspace}/out.new" in printed
    assert contents(workspace / "out") == {"precious": b"x"}
    assert not (workspace / "out.unfinished").exists()
    assert contents(workspace / "out.new") == whole


def test_what_is_done_outlives_a_destination_that_exists(begun, whole):
    (begun / "out").mkdir()
    with (
        pytest.raises(CheckpointError, match="pass overwrite=True, or --overwrite"),
        unfinished_folder(begun / "out", {}),
    ):
        pytest.fail("it was opened")
    assert recorded(begun) == BEGUN
    assert main(command(begun, "out", "--overwrite")) == 0
    assert contents(begun / "out") == whole


@pytest.mark.parametrize("left", ["replaced", "old"])
def test_an_old_folder_that_was_not_deleted_whole_is_no_hindrance(done, whole, left):
    (done / "out.unfinished" / left).mkdir(parents=True)
    (done / "out.unfinished" / left / "half").write_text("x")
    assert main(command(done, "out", "--overwrite")) == 0
    assert sorted(path.name for path in done.iterdir()) == ["model", "out", "text.txt"]
    assert contents(done / "out") == whole


def test_an_old_folder_is_kept_beside_what_took_its_place(workspace, capsys):
    for folder in ("model", "replaced"):
        (workspace / "out.unfinished" / folder).mkdir(parents=True)
    (workspace / "out.unfinished" / "replaced" / "precious").write_text("x")
    (workspace / "out").mkdir()
    assert main(command(workspace, "out", "--overwrite")) == 2
    assert "out.unfinished/replaced stood at" in capsys.readouterr().err
    assert contents(workspace / "out.unfinished" / "replaced") == {"precious": b"x"}


@pytest.mark.parametrize("option", ["--calibration", "source"])
def test_overwriting_what_holds_an_input_is_refused(workspace, capsys, option):
    (workspace / "all").mkdir()
    kept = workspace / ("text.txt" if option == "--calibration" else "model")
    kept.rename(workspace / "all" / kept.name)
    (workspace / kept.name).symlink_to(workspace / "all" / kept.name)
    assert main(command(workspace, "all", "--overwrite")) == 2
    assert f"{workspace}/all is or holds {kept}" in capsys.readouterr().err
    assert (workspace / "all" / kept.name).exists()


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ("text.txt", "would replace what is there"),
        ("model/config.json", "would replace what is there"),
        ("out", "out is or holds"),
        ("out.unfinished", "is made, is or holds"),
    ],
)
def test_a_report_does_not_replace_what_is_needed(workspace, capsys, report, said):
    before = contents(workspace / "model")
    assert main(command(workspace, "out", "--report", str(workspace / report))) == 2
    assert said in capsys.readouterr().err
    assert contents(workspace / "model") == before
    assert (workspace / "text.txt").read_text() == TEXT
    assert sorted(path.name for path in workspace.iterdir()) == ["model", "text.txt"]


def test_a_report_does_not_replace_the_manifest(done, capsys, whole):
    manifest = str(done / "out" / "prox24.json")
    assert main(["verify", str(done / "out"), "--report", manifest]) == 2
    assert "would replace what is there" in capsys.readouterr().err
    assert contents(done / "out") == whole


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_source_where_the_work_would_be_is_kept(workspace, capsys, inside):
    source = workspace / "out.unfinished" / inside
    source.parent.mkdir(exist_ok=True)
    (workspace / "model").rename(source)
    before = contents(source)
    given = command(workspace)
    given[1] = str(source)
    assert main(given) == 2
    assert f"out is made, is or holds {source}; choose another" in capsys.readouterr().err
    assert contents(source) == before


@pytest.mark.parametrize("destination", ["/", ".."])
def test_a_destination_without_a_name_is_refused(workspace, capsys, destination):
    convert = ["convert", str(workspace / "model"), destination, "--overwrite"]
    assert main(convert) == 2
    assert f"{destination} has no name of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (
            lambda out, work: out.symlink_to("nowhere"),
            "{out} is a link to what does not exist",
        ),
        (lambda out, work: work.write_text("x"), "{out}.unfinished, where"),
        (lambda out, work: (work / "precious").mkdir(parents=True), "be made, holds precious"),
    ],
)
def test_what_stands_in_the_way_is_named_and_kept(workspace, capsys, put, said):
    out, work = workspace / "out", workspace / "out.unfinished"
    put(out, work)
    before = sorted(workspace.rglob("*"))
    assert main(command(workspace)) == 2
    assert said.replace("{out}", str(out)) in capsys.readouterr().err
    assert sorted(workspace.rglob("*")) == before


def test_a_tensor_that_pruning_does_not_read_is_looked_at_before(workspace, monkeypatch, capsys):
    path, name = workspace / "model" / "model.safetensors", "lm_head.weight"
    weights = weights_of(path)
    weights[name] = np.full_like(weights[name], np.inf)
    save_file(weights, path)
    monkeypatch.setattr(prune.loop, "prune_stages", None)
    assert main(command(workspace)) == 2
    assert f"tensor {name} holds NaN or Inf" in capsys.readouterr().err


def test_a_copy_of_the_embedding_stays_one(workspace):
    path = workspace / "model" / "model.safetensors"
    weights = weights_of(path)
    embedding = "model.embed_tokens.weight"
    save_file(weights | {"lm_head.weight": weights[embedding].copy()}, path)
    config = json.loads((workspace / "model" / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (workspace / "model" / "config.json").write_text(json.dumps(config))
    assert main(command(workspace, "out", "--dtype", "float16")) == 0
    written = weights_of(workspace / "out" / "model.safetensors")
    head = written["lm_head.weight"]
    np.testing.assert_array_equal(head, written[embedding])
    assert head.dtype == np.float16


def test_what_a_buffer_holds_is_copied(workspace):
    path = workspace / "model" / "model.safetensors"
    weights = weights_of(path)
    mask = "model.layers.0.self_attn.masked_bias"
    save_file(weights | {mask: np.array(-np.inf, np.float16)}, path)
    assert main(command(workspace, "out", "--dtype", "float32")) == 0
    written = weights_of(workspace / "out" / "model.safetensors")[mask]
    assert (written.dtype, float(written)) == (np.float16, -np.inf)
    assert main(["verify", str(workspace / "out"), "--quiet"]) == 0


def test_a_destination_that_cannot_be_written_is_named(workspace, capsys):
    assert main(command(workspace, "/proc/out")) == 2
    assert "cannot write /proc/out" in capsys.readouterr().err


def change_after_filling(monkeypatch, *paths):
    fill_folder = prune.fill_folder

    def change_after(*arguments, **keywords):
        digests = fill_folder(*arguments, **keywords)
        for path in paths:
            path.touch()
            os.utime(path, (0, 0))
        return digests

    monkeypatch.setattr(prune, "fill_folder", change_after)


def test_a_source_that_changes_while_it_is_read_is_named(workspace, monkeypatch, capsys):
    change_after_filling(monkeypatch, workspace / "model" / "config.json")
    assert main(command(workspace)) == 2
    assert "config.json changed while it was read" in capsys.readouterr().err
    assert sorted(path.name for path in workspace.iterdir()) == ["model", "text.txt"]


def test_files_that_decide_nothing_may_change(workspace, monkeypatch):
    names = ["README.md", "pytorch_model.bin", "tokenizer_config.json"]
    paths = [workspace / "model" / name for name in names]
    for path in paths:
        path.touch()
    change_after_filling(monkeypatch, *paths)
    assert main(command(workspace)) == 0


def test_every_shard_that_is_read_decides_a_run(tmp_path):
    assert main(in_shards(tmp_path)) == 0
    files = source_files(tmp_path / "shards")
    assert len(files) > 3
    assert files.keys() == {
        path.name for path in (tmp_path / "shards").iterdir() if path.name.startswith("model")
    } | {"config.json"}
    check_unchanged(tmp_path / "shards", files)
    shard = next(name for name in files if "-of-" in name)
    (tmp_path / "shards" / shard).unlink()
    with pytest.raises(CheckpointError, match=f"{shard} changed"):
        check_unchanged(tmp_path / "shards", files)


def test_a_file_system_that_cannot_wait_for_names_is_written_to(tmp_path, monkeypatch):
    fsync, refused = os.fsync, []

    def of_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files)
    assert main(in_shards(tmp_path)) == 0
    assert refused


def test_a_run_that_is_ended_in_its_last_step_is_done(workspace, monkeypatch, capsys, whole):
    synchronise = unfinished.synchronise

    def ended(path):
        if path == workspace and (workspace / "out").exists():
            raise KeyboardInterrupt
        synchronise(path)

    monkeypatch.setattr(unfinished, "synchronise", ended)
    assert main(command(workspace)) == 130
    assert "goes on with it" not in capsys.readouterr().err
    assert sorted(path.name for path in workspace.iterdir()) == ["model", "out", "text.txt"]
    assert contents(workspace / "out") == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_report_that_cannot_be_written_takes_nothing_with_it(workspace, capsys):
    given = ["--report", "/dev/full", "--json"]
    assert main(command(workspace, "out", *given)) == 2
    printed = capsys.readouterr()
    assert "linears" in json.loads(printed.out)
    assert "cannot write /dev/full: No space left on device" in printed.err
    assert main(["verify", str(workspace / "out"), *given]) == 2
    assert json.loads(capsys.readouterr().out)["problems"] == {}


def test_a_tokenizer_that_cannot_be_written_is_named(tmp_path):
    class Full:
        def save_pretrained(self, folder):
            raise Exception("No space left on device (os error 28)")

    write_tiny(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "config.json"  # in place of a GGUF file, which holds a tokenizer
    given = dataclasses.replace(checkpoint, path=file, load_tokenizer=Full)
    tensors = ((name, checkpoint.read(name)) for name in checkpoint.tensors)
    with pytest.raises(DiskError, match=r"cannot write .*: No space left on device"):
        writer.write_checkpoint(given, tmp_path / "out", tensors)
    assert not (tmp_path / "out").exists()


def test_a_run_that_goes_on_takes_the_other_files_that_are_there_now(workspace, monkeypatch, whole):
    for name in ("notes.txt", "optimizer.pt"):  # the latter as weights that are not read
        (workspace / "model" / name).write_text("x")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, KeyboardInterrupt)
        assert main(command(workspace)) == 130
    for name in ("notes.txt", "optimizer.pt"):
        (workspace / "model" / name).unlink()
    (workspace / "model" / "licence.txt").write_text("y")
    assert main(command(workspace)) == 0
    assert contents(workspace / "out") == whole | {"licence.txt": b"y"}


@pytest.mark.parametrize("count", [0, 5])
def test_the_old_folder_is_put_back_when_the_last_step_fails(tmp_path, monkeypatch, count):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    rename = Path.rename

    def fail(path, target):
        if path.name == "model":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    def write():
        with unfinished_folder(tmp_path / "out", {}, overwrite=True) as work:
            (work.folder / "new").write_text("y")
            for i in range(count):
                work.record(unfinished.Written(str(i), work.folder / "new", ""), {})

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(DiskError, match="Input/output error"):
            write()
    assert contents(tmp_path / "out") == {"precious": b"x"}
    assert (tmp_path / "out.unfinished").exists() == (count > 0)


def test_a_kill_between_the_two_renamings_loses_no_folder(tmp_path):
    (tmp_path / "out.unfinished" / "replaced").mkdir(parents=True)
    (tmp_path / "out.unfinished" / "replaced" / "precious").write_text("x")
    with pytest.raises(ZeroDivisionError), unfinished_folder(tmp_path / "out", overwrite=True):
        raise ZeroDivisionError
    assert contents(tmp_path / "out") == {"precious": b"x"}


def test_verify_compares_with_the_manifest_and_the_source(done, capsys):
    verify = ["verify", str(done / "out"), "--source", str(done / "model")]
    report = done / "report.json"
    assert main([*verify, "--report", str(report)]) == 0
    assert "compared with the manifest" in capsys.readouterr().out
    assert json.loads(report.read_text())["problems"] == {}

    path = done / "out" / "model.safetensors"
    for name, problem in [
        (Q_PROJ, f"{Q_PROJ}: is not what the manifest says"),
        ("model.norm.weight", "model.norm.weight: is not what the source has"),
    ]:
        values = safetensors_file.open_file(path)[name].read()
        content = path.read_bytes()
        place = content.index(values.tobytes())
        flipped = np.frombuffer(content, np.uint8).copy()
        flipped[place + int(np.flatnonzero(values.reshape(-1).astype(np.float32))[0]) * 2] ^= 1
        path.write_bytes(flipped.tobytes())
        assert main(verify) == 1
        assert problem in capsys.readouterr().out
        path.write_bytes(content)

    weights = weights_of(path)
    extra = {"more": np.zeros(2, np.float32)}
    save_file(weights | extra, path)
    assert main(verify) == 1
    assert "more: is not in the manifest" in capsys.readouterr().out
    (done / "out" / "prox24.json").write_text("{}")
    assert main(verify) == 2
    assert "does not list the tensors" in capsys.readouterr().err

    (done / "out" / "prox24.json").unlink()
    assert main(verify) == 1
    assert "more: is not in the source" in capsys.readouterr().out
    source = done / "model" / "model.safetensors"
    save_file(weights_of(source) | {"less": extra["more"], "more": np.zeros(3, np.float32)}, source)
    assert main(verify) == 1
    printed = capsys.readouterr().out
    assert "less: is missing" in printed
    assert "more: has shape (2,), the source has (3,)" in printed


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (b'"BF16"', b'"F16" ', "is float16, the manifest says bfloat16"),
        (b"\x80\x3f", b"\x80\x7f", "holds NaN or Inf"),  # 1.0, of a norm
    ],
)
def test_verify_goes_on_after_what_is_wrong_and_reports_it(done, capsys, before, after, problem):
    path = done / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(before, after))
    report = done / "report.json"
    assert main(["verify", str(done / "out"), "--report", str(report)]) == 1
    problems = json.loads(report.read_text())["problems"]
    name = "model.layers.0.input_layernorm.weight"
    assert problems[name].startswith(problem)
    assert f"{name}: {problem}" in capsys.readouterr().out
