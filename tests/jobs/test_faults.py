"""What goes wrong while a model is pruned: nothing is half-written, and nothing is lost."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import stat
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from commands import calibrated, contents, error_line, files, run, write_workspace
from safetensors.numpy import load_file, save_file
from tiny import Q_PROJ, write_tiny

from prox24._checkpoints import safetensors_file, unfinished, writer
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.unfinished import check_unchanged, source_files, unfinished_folder
from prox24._jobs import forward, prune
from prox24.errors import CheckpointError, DiskError, Prox24Error, UnsupportedModelError

BEGUN = 5
EMBEDDING = "model.embed_tokens.weight"
ON_DISK = ["--activations", "disk"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A model and a text, the same with a pruned model, and the same with half of one."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "given").mkdir()
    write_workspace(folder / "given", dtype="bfloat16")
    for name in ("done", "begun"):
        shutil.copytree(folder / "given", folder / name)
    assert pruned(folder / "done") == 0
    assert pruned_until(BEGUN, folder / "begun") == 130
    return folder


def copied(name):
    @pytest.fixture
    def copy(template, tmp_path):
        return shutil.copytree(template / name, tmp_path, dirs_exist_ok=True)

    return copy


workspace, done, begun = map(copied, ("given", "done", "begun"))


@pytest.fixture
def whole(template):
    """The files of the pruned model."""
    return contents(template / "done" / "out")


def command(workspace, *more, destination="out"):
    every = ["prune", workspace / "model", workspace / destination, "--method", "wanda"]
    return [str(argument) for argument in [*every, *calibrated(workspace), "--quiet", *more]]


def pruned(workspace, *more, **options):
    """The exit code."""
    return run(*command(workspace, *more, **options))


def assert_finishes(workspace, whole, *more):
    assert pruned(workspace, *more) == 0
    assert contents(workspace / "out") == whole


def precious(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "precious").write_text("x")
    return contents(folder)


def of_system(code):
    return OSError(code, os.strerror(code))


def raising(error):
    def fail(*arguments, **keywords):
        raise error

    return fail


def pruned_until(count, workspace, *more, stop=raising(KeyboardInterrupt)):
    """The exit code of a run that is stopped when it would write its next tensor."""
    create_file, written = safetensors_file.create_file, iter(range(count))

    @contextlib.contextmanager
    def failing(path, specs):
        with create_file(path, specs) as put:

            def put_or_fail(name, values):
                if next(written, None) is None:
                    stop()
                put(name, values)

            yield put_or_fail

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "create_file", failing)
        return pruned(workspace, *more)


def in_shards(tmp_path):
    write_tiny(tmp_path / "model")
    places = [tmp_path / "model", tmp_path / "shards"]
    return run("convert", *places, "--shard-size", "20KB", "--quiet")


def recorded(workspace):
    return len((workspace / "out.unfinished" / "journal.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("variant", "options", "kept"),
    [
        ("gpt2", "--activations disk --targets dense --dtype float16 --shard-size 20KB", 7),
        pytest.param("mixtral", "--method sparsegpt", 7, marks=pytest.mark.slow),
        # The bias of the values is not there yet, so values and their reader begin anew.
        ("qwen2", "--basis heads --basis-steps 5", 5),
    ],
)
def test_a_run_that_goes_on_writes_the_same_bytes(tmp_path, capsys, variant, options, kept):
    write_workspace(tmp_path, variant)
    options = options.split()
    assert pruned(tmp_path, *options, destination="whole") == 0
    assert pruned_until(7, tmp_path, *options) == 130
    said = f"prox24: interrupted; what is done is in {tmp_path}/out.unfinished: "
    assert capsys.readouterr().err.startswith(said)
    assert not (tmp_path / "out").exists()
    assert pruned(tmp_path, *options, "--report", tmp_path / "report.json") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.unfinished").exists()
    resumed = json.loads((tmp_path / "report.json").read_text())
    assert resumed["resumed_linears"] == kept
    names = [linear["name"] for linear in resumed["linears"]]
    assert len(names) == len(set(names)) > 7


STATES = "out.unfinished/activations/0"


@pytest.mark.parametrize(
    ("place", "lose", "expected"),
    [
        ("memory", None, [0, 1]),
        ("disk", None, [1]),  # in the second of two layers
        ("disk", lambda at: os.truncate(at / STATES / "pruned-1", 100), [0, 1]),
        ("disk", lambda at: (at / STATES / "layer").write_bytes(b"9"), [0, 1]),
        ("disk", lambda at: (at / STATES / "layer").write_bytes(b"\xff"), [0, 1]),
    ],
)
def test_hidden_states_on_disk_spare_the_finished_layers_unless_they_are_lost(
    workspace, monkeypatch, whole, place, lose, expected
):
    options = ["--activations", place]
    assert pruned_until(9, workspace, *options) == 130
    if lose is not None:
        lose(workspace)
        with monkeypatch.context() as patch:  # It begins anew, and does not come far.
            patch.setattr(forward, "run_into", raising(KeyboardInterrupt))
            assert pruned(workspace, *options) == 130
    read, layer_weights = [], forward.layer_weights

    def noted(model, index):
        read.append(index)
        return layer_weights(model, index)

    monkeypatch.setattr(forward, "layer_weights", noted)
    assert_finishes(workspace, whole, *options)
    assert read == expected


def test_another_place_of_activations_is_refused(workspace):
    with pytest.raises(Prox24Error, match="activations 'Disk' is neither 'memory' nor 'disk'"):
        prune.prune(workspace / "model", workspace / "out", activations="Disk")


def test_a_model_that_torchax_does_not_take_loses_nothing(begun, monkeypatch, capsys):
    unknown = dataclasses.replace(open_checkpoint(begun / "model"), decoder=None)
    monkeypatch.setattr(prune.torchax, "open_any", lambda path: unknown)
    left = begun / "out.unfinished"
    before = {path: path.read_bytes() for path in left.rglob("*") if path.is_file()}
    assert before
    assert pruned(begun, "--activations", "disk") == 2
    assert {path: path.read_bytes() for path in left.rglob("*") if path.is_file()} == before

    def unreadable(checkpoint, windows):  # as torchax says it of a file system that fails
        raise UnsupportedModelError("transformers cannot load it: Input/output error")

    monkeypatch.setattr(prune, "TorchRunner", unreadable)
    assert "Input/output error" in error_line(capsys, *command(begun))
    assert {path: path.read_bytes() for path in left.rglob("*") if path.is_file()} == before


CHANGES = {"open", "os.rename", "os.truncate", "os.remove", "os.mkdir", "os.rmdir"}


def test_a_run_that_ends_at_any_place_ends_with_the_same_bytes(workspace, whole):
    """What a killed process leaves is what is on disk then, in one process with copies of it."""
    states, copying = [], []

    def copy_state(event, arguments):
        """Before every change in the folder, and every file read."""
        folder = str(workspace / "out")
        if copying and event in CHANGES and str(arguments[0]).startswith(folder):
            copying.clear()
            states.append(workspace / "states" / str(len(states)))
            for folder in workspace.glob("out*"):
                shutil.copytree(folder, states[-1] / folder.name)
            copying.append(True)

    (workspace / "states").mkdir()
    sys.addaudithook(copy_state)
    copying.append(True)
    assert pruned(workspace) == 0
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
            assert pruned(workspace) == 0
        assert contents(workspace / "out") == whole
        shutil.rmtree(workspace / "out")
        shutil.rmtree(workspace / "out.unfinished", ignore_errors=True)
    assert resumed > 4


def terminate():
    signal.raise_signal(signal.SIGTERM)


def terminate_in_native_code():
    """As CPython reports a signal that arrives in Python code called by C code."""
    try:
        terminate()
    except KeyboardInterrupt as error:
        raise SystemError("a function returned a result with an exception set") from error


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        (terminate, 128 + signal.SIGTERM, "ended by SIGTERM"),
        (terminate_in_native_code, 128 + signal.SIGTERM, "ended by SIGTERM"),
        (raising(of_system(errno.ENOSPC)), 2, "No space left on device"),
    ],
)
def test_a_run_that_is_stopped_loses_nothing(workspace, capsys, whole, stop, code, said):
    assert pruned_until(8, workspace, stop=stop) == code
    printed = capsys.readouterr().err
    assert f"{said}; what is done is in {workspace}/out.unfinished: " in printed
    assert printed.startswith("prox24: ")
    assert printed.count("\n") == 1
    assert not (workspace / "out").exists()
    assert recorded(workspace) == 8
    assert_finishes(workspace, whole)


def edited(file, change):
    def edit(workspace):
        (workspace / file).write_text(change((workspace / file).read_text()))

    return edit


JOB = "out.unfinished/job.json"


def of_job(change):
    def changed(text):
        change(job := json.loads(text))
        return json.dumps(job)

    return edited(JOB, changed)


def old_job(job):
    """Of a version that had no recipes."""
    job["versions"]["prox24"] = "0.1.0"
    job["arguments"] = job.pop("recipe")


def without_end(line):
    def change(text):
        return text.replace(text.splitlines()[line], text.splitlines()[line][:-9])

    return change


def damage_tensor(workspace):
    path = workspace / "out.unfinished" / "model" / "model.safetensors"
    before = safetensors_file.open_file(path)[Q_PROJ].read().tobytes()
    path.write_bytes(path.read_bytes().replace(before, b"\x17" + before[1:]))


DAMAGED = "is damaged; delete {work} to start anew"
OLDER = "{work} was begun by prox24 0.1.0; finish it with that version, or delete it to start anew"
SOURCE, JOURNAL = "model/model.safetensors", "out.unfinished/journal.jsonl"
OTHER_RUNS = [
    (edited("text.txt", "Another ".__add__), 'calibration.sha256 was "'),
    (lambda folder: os.utime(folder / SOURCE, (0, 0)), "source.model.safetensors was ["),
    (lambda at: None, "recipe.damping was 0.01, is 0.5", "--damping", "0.5"),
    (of_job(lambda job: job["versions"].update(jax="0.1")), 'versions.jax was "0.1", is'),
    (of_job(old_job), OLDER),
    (of_job(lambda job: job["devices"].append(7)), "devices was"),
    (of_job(lambda job: job.update(processes=3)), "processes was 3, is 1"),
    (damage_tensor, f"{Q_PROJ} is damaged; delete {{work}}"),
    (edited(JOURNAL, without_end(2)), f"{{work}}/journal.jsonl {DAMAGED}"),
    (edited(JOB, without_end(-1)), f"{{work}}/job.json {DAMAGED}"),
    (lambda folder: (folder / JOB).unlink(), f"{{work}}/job.json {DAMAGED}"),
]


@pytest.mark.parametrize("case", OTHER_RUNS, ids=[case[1] for case in OTHER_RUNS])
def test_another_run_is_refused_and_the_work_stays(begun, capsys, case):
    change, said, *options = case
    change(begun)
    before = contents(begun / "out.unfinished" / "model")
    printed = error_line(capsys, *command(begun, *options))
    assert said.replace("{work}", str(begun / "out.unfinished")) in printed
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
    assert pruned(workspace) == 0
    told = [place for place, event in enumerate(events) if event == "journal.jsonl"]
    assert len(told) == 14
    assert {events[place - 1] for place in told} <= {"model.safetensors", "model.safetensors.new"}
    moved = events.index("model -> out")
    assert {"model.safetensors", "config.json", "prox24.json", "model"} <= {*events[:moved]}
    assert workspace.name in events[moved:]


def test_a_second_run_on_a_destination_is_refused(workspace, capsys):
    with unfinished_folder(workspace / "out"):
        said = error_line(capsys, *command(workspace))
    assert said == f"prox24: error: another process is writing {workspace}/out\n"


def test_a_disk_that_is_still_full_loses_nothing(begun, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    monkeypatch.setattr(writer, "_allocated", lambda folder: 0)
    assert "bytes do not fit; what is done is in" in error_line(capsys, *command(begun))
    assert recorded(begun) == BEGUN


def test_a_file_that_the_system_does_not_let_grow_loses_nothing(workspace, capsys, whole):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    half = len(whole["model.safetensors"]) // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, before[1]))
    try:
        said = error_line(capsys, *command(workspace))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "model.safetensors: File too large" in said
    assert not (workspace / "out").exists()
    assert_finishes(workspace, whole)


def test_what_is_done_outlives_a_journal_that_cannot_be_read(begun, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", raising(of_system(errno.EIO)))
        assert pruned(begun) == 2
    assert recorded(begun) == BEGUN


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such call here")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EOPNOTSUPP])
def test_activations_are_given_their_place_before_where_a_file_system_can(
    workspace, monkeypatch, capsys, code
):
    def refuse(descriptor, start, size):
        assert size == 8 * 32 * 32 * 4
        assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND
        raise of_system(code)

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    if code == errno.ENOSPC:
        said = "activations/0/pruned-0: No space left on device"
        assert said in error_line(capsys, *command(workspace, *ON_DISK))
    else:
        assert pruned(workspace, *ON_DISK) == 0


def after_filling(monkeypatch, act):
    fill_folder = prune.fill_folder

    def filled(*arguments, **keywords):
        digests = fill_folder(*arguments, **keywords)
        act()
        return digests

    monkeypatch.setattr(prune, "fill_folder", filled)


def test_what_came_to_stand_at_the_destination_is_kept(workspace, monkeypatch, capsys, whole):
    old = precious(workspace / "precious")
    after_filling(monkeypatch, lambda: precious(workspace / "out"))
    said = f"{workspace}/out came to exist meanwhile; the result is {workspace}/out.new"
    assert said in error_line(capsys, *command(workspace))
    assert contents(workspace / "out") == old
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
    assert_finishes(begun, whole, "--overwrite")


@pytest.mark.parametrize("left", ["replaced", "old"])
def test_an_old_folder_that_was_not_deleted_whole_is_no_hindrance(done, whole, left):
    precious(done / "out.unfinished" / left)
    assert_finishes(done, whole, "--overwrite")
    assert files(done) == ["model", "out", "text.txt"]


def test_an_old_folder_is_kept_beside_what_took_its_place(workspace, capsys):
    (workspace / "out.unfinished" / "model").mkdir(parents=True)
    old = precious(workspace / "out.unfinished" / "replaced")
    (workspace / "out").mkdir()
    said = error_line(capsys, *command(workspace, "--overwrite"))
    assert "out.unfinished/replaced stood at" in said
    assert contents(workspace / "out.unfinished" / "replaced") == old


def test_a_tensor_that_pruning_does_not_read_is_looked_at_before(workspace, monkeypatch, capsys):
    path, name = workspace / "model" / "model.safetensors", "lm_head.weight"
    weights = load_file(path)
    weights[name] = np.full_like(weights[name], np.inf)
    save_file(weights, path)
    monkeypatch.setattr(prune.loop, "prune_stages", None)
    assert f"tensor {name} holds NaN or Inf" in error_line(capsys, *command(workspace))
    assert files(workspace) == ["model", "text.txt"]


def test_a_copy_of_the_embedding_stays_one_and_a_buffer_stays_as_it_is(workspace):
    path, config = (workspace / "model" / name for name in ("model.safetensors", "config.json"))
    weights, mask = load_file(path), "model.layers.0.self_attn.masked_bias"
    weights["lm_head.weight"] = weights[EMBEDDING].copy()
    save_file(weights | {mask: np.array(-np.inf, np.float16)}, path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    assert pruned(workspace, "--dtype", "float32") == 0
    written = load_file(workspace / "out" / "model.safetensors")
    np.testing.assert_array_equal(written["lm_head.weight"], written[EMBEDDING])
    assert written["lm_head.weight"].dtype == np.float32
    assert (written[mask].dtype, float(written[mask])) == (np.float16, -np.inf)
    assert run("verify", workspace / "out", "--quiet") == 0


def test_a_source_that_changes_while_it_is_read_is_named(workspace, monkeypatch, capsys):
    config = workspace / "model" / "config.json"
    after_filling(monkeypatch, lambda: os.utime(config, (0, 0)))
    said = error_line(capsys, *command(workspace))
    assert "config.json changed while it was read" in said
    assert files(workspace) == ["model", "text.txt"]


def test_the_config_and_every_shard_that_is_read_decide_a_run(tmp_path):
    assert in_shards(tmp_path) == 0
    for name in ("README.md", "pytorch_model.bin"):  # beside the files of the tokenizer
        (tmp_path / "shards" / name).touch()
    found = source_files(tmp_path / "shards")
    assert len(found) > 3
    models = {name for name in files(tmp_path / "shards") if name.startswith("model")}
    assert found.keys() == models | {"config.json"}
    check_unchanged(tmp_path / "shards", found)
    shard = next(name for name in found if "-of-" in name)
    (tmp_path / "shards" / shard).unlink()
    with pytest.raises(CheckpointError, match=f"{shard} changed"):
        check_unchanged(tmp_path / "shards", found)


def test_a_model_of_the_hub_may_be_downloaded_again_before_a_run_goes_on(tmp_path):
    folder, blob = tmp_path / "snapshots" / "1", tmp_path / "blobs" / "hash"
    write_tiny(folder.parent)
    folder.mkdir()
    blob.parent.mkdir()
    (folder.parent / "model.safetensors").rename(blob)
    (folder.parent / "config.json").rename(folder / "config.json")
    (folder / "model.safetensors").symlink_to("../../blobs/hash")
    found = source_files(folder)
    os.utime(blob, (0, 0))
    check_unchanged(folder, found)
    os.utime(folder / "config.json", (0, 0))
    with pytest.raises(CheckpointError, match=r"config\.json changed"):
        check_unchanged(folder, found)


def test_a_file_system_that_cannot_wait_for_names_is_written_to(tmp_path, monkeypatch):
    fsync, refused = os.fsync, []

    def of_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise of_system(errno.EINVAL)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files)
    assert in_shards(tmp_path) == 0
    assert refused


def test_a_run_that_is_ended_in_its_last_step_is_done(workspace, monkeypatch, capsys, whole):
    synchronise = unfinished.synchronise

    def ended(path):
        if path == workspace and (workspace / "out").exists():
            raise KeyboardInterrupt
        synchronise(path)

    monkeypatch.setattr(unfinished, "synchronise", ended)
    assert pruned(workspace) == 130
    assert "goes on with it" not in capsys.readouterr().err
    assert files(workspace) == ["model", "out", "text.txt"]
    assert contents(workspace / "out") == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_report_that_cannot_be_written_takes_nothing_with_it(workspace, capsys):
    given = ["--report", "/dev/full", "--json"]
    assert pruned(workspace, *given) == 2
    printed = capsys.readouterr()
    assert "linears" in json.loads(printed.out)
    assert "cannot write /dev/full: No space left on device" in printed.err
    assert run("verify", workspace / "out", *given) == 2
    assert json.loads(capsys.readouterr().out)["problems"] == {}


def test_a_tokenizer_that_cannot_be_written_is_named(tmp_path):
    write_tiny(tmp_path / "model")
    error = Exception("No space left on device (os error 28)")
    full = types.SimpleNamespace(save_pretrained=raising(error))
    checkpoint = open_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "config.json"  # in place of a GGUF file, which holds a tokenizer
    given = dataclasses.replace(checkpoint, path=file, load_tokenizer=lambda: full)
    tensors = ((name, checkpoint.read(name)) for name in checkpoint.tensors)
    with pytest.raises(DiskError, match=r"cannot write .*: No space left on device"):
        writer.write_checkpoint(given, tmp_path / "out", tensors)
    assert not (tmp_path / "out").exists()


def test_a_run_that_goes_on_takes_the_other_files_that_are_there_now(workspace, whole):
    for name in ("notes.txt", "optimizer.pt"):  # the latter as weights that are not read
        (workspace / "model" / name).write_text("x")
    assert pruned_until(5, workspace) == 130
    for name in ("notes.txt", "optimizer.pt"):
        (workspace / "model" / name).unlink()
    (workspace / "model" / "licence.txt").write_text("y")
    assert_finishes(workspace, whole | {"licence.txt": b"y"})


@pytest.mark.parametrize("count", [0, 5])
def test_the_old_folder_is_put_back_when_the_last_step_fails(tmp_path, monkeypatch, count):
    old, rename = precious(tmp_path / "out"), Path.rename

    def fail(path, target):
        if path.name == "model":
            raise of_system(errno.EIO)
        return rename(path, target)

    def write():
        with unfinished_folder(tmp_path / "out", {}, overwrite=True) as work:
            (work.folder / "new").write_text("y")
            for i in range(count):
                work.record(unfinished.Written(str(i), work.folder / "new", ""), {})

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(DiskError, match="Input/output error"):
        write()
    assert contents(tmp_path / "out") == old
    assert (tmp_path / "out.unfinished").exists() == (count > 0)


def test_a_kill_between_the_two_renamings_loses_no_folder(tmp_path):
    old = precious(tmp_path / "out.unfinished" / "replaced")
    with pytest.raises(ZeroDivisionError), unfinished_folder(tmp_path / "out", overwrite=True):
        raise ZeroDivisionError
    assert contents(tmp_path / "out") == old


def test_verify_compares_with_the_manifest_and_the_source(done, capsys):
    verify = ["verify", done / "out", "--source", done / "model"]

    def problems():
        assert run(*verify) == 1
        return capsys.readouterr().out

    report = done / "report.json"
    assert run(*verify, "--report", report) == 0
    assert "compared with the manifest" in capsys.readouterr().out
    assert json.loads(report.read_text())["problems"] == {}

    path = done / "out" / "model.safetensors"
    extra = np.zeros(2, np.float32)
    save_file(load_file(path) | {"more": extra}, path)
    assert "more: is not in the manifest" in problems()
    (done / "out" / "prox24.json").write_text("{}")
    assert "does not list the tensors" in error_line(capsys, *verify)
    (done / "out" / "prox24.json").write_text('{"tensors": {}, "recipe": 5}')
    assert "is no object of fields" in error_line(capsys, *verify)

    (done / "out" / "prox24.json").unlink()
    assert "more: is not in the source" in problems()
    source = done / "model" / "model.safetensors"
    save_file(load_file(source) | {"less": extra, "more": np.zeros(3, np.float32)}, source)
    printed = problems()
    assert "less: is missing" in printed
    assert "more: has shape (2,), the source has (3,)" in printed
    save_file(load_file(source) | {f"less {i}": extra for i in range(30)}, source)
    assert run(*verify, "--quiet") == 1
    *said, last = capsys.readouterr().out.splitlines()
    assert len(said) == 20
    assert last.startswith("and 12 more")


NORM = "model.layers.0.input_layernorm.weight"


def changed(before, after):
    return lambda content, values: content.replace(before, after)


def flipped(content, values):
    """The file with a bit less or more in the first entry that is not 0."""
    start = content.index(values.tobytes())
    start += 2 * int(np.flatnonzero(values.reshape(-1).astype(np.float32))[0])
    return content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :]


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (Q_PROJ, flipped, "is not what the manifest says"),
        ("model.norm.weight", flipped, "is not what the source has"),
        (NORM, changed(b'"BF16"', b'"F16" '), "is float16, the manifest says bfloat16"),
        (NORM, changed(b"\x80\x3f", b"\x80\x7f"), "holds NaN or Inf"),  # 1.0, of a norm
    ],
)
def test_verify_reports_every_tensor_that_changed(done, capsys, name, change, problem):
    path, report = done / "out" / "model.safetensors", done / "report.json"
    path.write_bytes(change(path.read_bytes(), safetensors_file.open_file(path)[name].read()))
    source = ["--source", done / "model"] if "source" in problem else []
    assert run("verify", done / "out", *source, "--report", report) == 1
    assert json.loads(report.read_text())["problems"][name].startswith(problem)
    assert f"{name}: {problem}" in capsys.readouterr().out
