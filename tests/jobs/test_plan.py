"""What is said of memory and work before a model is pruned."""

import dataclasses
import functools
import json
import re
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import TEXT, error_line, printed_json, run
from safetensors.numpy import load_file, save_file
from tiny import Q_PROJ, config_dict, random_weights, write_folder, write_tiny

import prox24
from prox24 import basis
from prox24._checkpoints.checkpoint import open_checkpoint, open_described
from prox24._core.placement import common_mesh
from prox24._jobs import memory
from prox24._jobs.forward import layer_linears, load_model
from prox24._jobs.memory import Setup
from prox24._jobs.native import native_runner
from prox24.errors import CalibrationError, CheckpointError, Prox24Error

WANDA = prox24.Recipe.wanda()


@pytest.fixture
def model(tmp_path):
    write_tiny(tmp_path / "model")
    return load_model(open_checkpoint(tmp_path / "model"))


def layer_memory(model, size=1, recipe=WANDA, *sharing, length=32):
    return memory.layer_memory(model, 0, (size, length), Setup(recipe, *sharing))


def changed(recipe=WANDA, **fields):
    return dataclasses.replace(recipe, **fields)


def test_memory_counts_weights_grams_and_the_micro_batch(model):
    one, four = (layer_memory(model, size) for size in (1, 4))
    tensors = model.checkpoint.tensors
    layer = [tensors[name].shape for name in tensors if name.startswith("model.layers.0.")]
    assert one.weights == sum(4 * int(np.prod(shape)) for shape in layer)
    hidden, width = config_dict()["hidden_size"], config_dict()["intermediate_size"]
    assert one.grams == 4 * (3 * hidden**2 + width**2)
    # The Grams, what compensates for their rounding, and the weights.
    assert one.gather > 2 * one.grams + one.weights
    assert four.gather >= one.gather + 3 * 32 * hidden * 4
    assert one.solve == four.solve > 2 * one.weights + one.grams
    # What stays dense has no Gram.
    skipped = layer_memory(model, 1, changed(skip="mlp"))
    assert (skipped.weights, skipped.grams) == (one.weights, 4 * 2 * hidden**2)
    assert layer_memory(model, 1, changed(only="no such name"))[1::2] == (0, 2 * one.weights)


def test_devices_divide_the_rows_of_weights_or_the_columns_of_grams(model):
    one, rows = (layer_memory(model, 1, WANDA, devices) for devices in (1, 2))
    columns = layer_memory(model, 1, WANDA, 2, True)
    assert rows.solve < one.solve
    assert columns.grams == one.grams // 2
    assert columns.gather < rows.gather
    assert columns.solve < rows.solve
    # By 7 none of the numbers of rows is divisible,
    assert layer_memory(model, 1, WANDA, 7).solve == one.solve
    # nor a width: devices have copies, and send one another tokens.
    copies = layer_memory(model, 1, WANDA, 7, True)
    assert (copies.grams, copies.solve) == (one.grams, one.solve)
    assert copies.gather > one.gather
    budget = max(columns.gather, columns.solve)
    assert memory.fitting_micro_batch(model, (8, 32), Setup(WANDA, 2, True), budget) == 2
    with pytest.raises(Prox24Error, match="memory is too small"):
        memory.fitting_micro_batch(model, (8, 32), Setup(WANDA, 2), budget)


def test_the_largest_micro_batch_that_fits_is_found(model):
    needed = {size: layer_memory(model, size, length=64).gather for size in (1, 3, 12)}
    for size, budget in needed.items():
        assert memory.fitting_micro_batch(model, (12, 64), Setup(WANDA), budget) == size
    with pytest.raises(Prox24Error, match="memory is too small: one window in layer 0"):
        memory.fitting_micro_batch(model, (12, 64), Setup(WANDA), needed[1] - 1)
    with pytest.raises(Prox24Error, match=r"too small: solving model\.layers\.0\..* takes \d+MB"):
        memory.fitting_micro_batch(model, (12, 64), Setup(WANDA), 10)


def test_pruned_weights_count_in_their_own_dtype(tmp_path):
    write_tiny(tmp_path / "model", dtype="bfloat16")
    model = load_model(open_checkpoint(tmp_path / "model"))
    linears = sum(int(np.prod(linear.shape)) for linear in layer_linears(model.config, 0))
    wide, own = (layer_memory(model, 1, changed(dtype=dtype)) for dtype in ("float32", None))
    assert wide.solve - own.solve == 2 * linears


def test_learning_a_basis_counts_and_xla_needs_no_more(model):
    attention = changed(only="self_attn")
    turned = changed(attention, basis=prox24.HeadBasis())
    hidden = config_dict()["hidden_size"]
    copies = memory.TURNING * 4 * 2 * hidden**2
    with_basis, without = (layer_memory(model, recipe=r).solve for r in (turned, attention))
    assert without < with_basis <= without + copies
    skipped = (changed(recipe, skip="v_proj") for recipe in (turned, attention))
    assert len({layer_memory(model, recipe=recipe).solve for recipe in skipped}) == 1
    for heads, members, width, inputs in ((3, 3, 64, 576), (8, 1, 128, 1024)):
        places = basis.places_of(heads, width), basis.places_of(heads, width, members)
        queries = places[1].size
        shapes = (places[0].size, inputs), (inputs, queries)
        weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        grams = [jax.ShapeDtypeStruct((n, n), jnp.float32) for n in (inputs, queries)]

        def learn(weights, grams, places=places):
            parts = [basis.Part(*each) for each in zip(weights, grams, (0, 1), places, strict=True)]
            return basis.learn(parts)

        needed = memory._needed(jax.jit(learn).lower(weights, grams))
        entries = sum(weight.size for weight in weights)
        # Beside weights and Grams, as the plan counts them.
        own = 4 * (entries + sum(gram.size for gram in grams))
        assert needed - own <= memory.TURNING * 4 * entries


@pytest.mark.slow  # programs of a whole training
def test_a_dense_model_alongside_and_a_training_count(model, standard_promotion):
    dense = changed(targets=prox24.DenseTargets())
    refining = changed(refine=prox24.BlockRefinement())
    plain, alongside, refined = (
        layer_memory(model, 1, recipe) for recipe in (WANDA, dense, refining)
    )
    training = memory.refining_memory(model, 0, (1, 32), refining, 1)
    # Cross-Grams, and what compensates for their rounding.
    assert alongside.gather >= plain.gather + 2 * plain.grams
    assert alongside.solve >= plain.solve + plain.grams
    assert memory.refining_memory(model, 0, (1, 32), WANDA, 1) == 0
    # The dense model runs alongside, without cross-Grams.
    assert plain.gather < refined.gather < alongside.gather
    # Dense, pruned, best, master, two moments and a gradient.
    assert training > 7 * plain.weights
    # A sum of gradients is there if a step has several micro-batches, as it has of 16 windows.
    parts, whole = (16, 32), (8, 32)
    assert memory.fitting_micro_batch(model, whole, Setup(refining), training) == 1
    for recipe, windows, needed in (
        (dense, parts, alongside.gather),
        (refining, parts, training + plain.weights),
    ):
        assert memory.fitting_micro_batch(model, windows, Setup(recipe), needed) == 1
        with pytest.raises(Prox24Error, match="one window in layer 0 takes"):
            memory.fitting_micro_batch(model, windows, Setup(recipe), needed - 1)


def test_operations_are_those_of_the_products(model):
    counted = memory.operations(model, 100, WANDA)
    tensors = model.checkpoint.tensors
    shapes = [tensors[name].shape for name in tensors if name.endswith("proj.weight")]
    assert counted["forward"] == 2 * 100 * sum(2 * out * width for out, width in shapes)
    hidden, width = config_dict()["hidden_size"], config_dict()["intermediate_size"]
    assert counted["grams"] == 100 * 2 * (2 * (3 * hidden**2 + width**2))
    # The dense layers run once more, and with dense targets there are cross-Grams.
    both = memory.operations(model, 100, changed(targets=prox24.DenseTargets()))
    assert both == {"forward": 1.5 * counted["forward"], "grams": 2 * counted["grams"]}
    some = memory.operations(model, 100, dataclasses.replace(WANDA, only="q_proj"))
    assert some == {"forward": counted["forward"], "grams": 100 * 2 * 2 * hidden**2}
    refined = memory.operations(model, 100, changed(refine=prox24.BlockRefinement()))
    assert refined == {"forward": both["forward"], "grams": counted["grams"]}


def test_equal_layers_are_looked_at_once(tmp_path):
    write_tiny(tmp_path / "model", "qwen2")  # whose first layer has no window
    mixed = load_model(open_checkpoint(tmp_path / "model"))
    assert memory.distinct_layers(mixed, WANDA) == [0, 1]
    config = config_dict(num_hidden_layers=5)
    write_folder(tmp_path / "equal", config, random_weights(config))
    equal = load_model(open_checkpoint(tmp_path / "equal"))
    assert memory.distinct_layers(equal, WANDA) == [0]
    skipping = dataclasses.replace(WANDA, skip=r"layers\.[02]")
    assert memory.distinct_layers(equal, skipping) == [0, 1]
    planned = prox24.plan(tmp_path / "equal", skipping, samples=8, sequence_length=32)
    assert planned.layer_gram_bytes > 0


@pytest.mark.parametrize(
    ("samples", "share", "said"),
    [(1, 0.125, "takes 2 calibration windows or more"), (8, 1.0, "all 8 windows are held out")],
)
def test_windows_too_few_to_refine_are_refused(tmp_path, samples, share, said):
    write_tiny(tmp_path / "model")
    recipe = prox24.Recipe(refine=prox24.BlockRefinement(held_out=share))
    with pytest.raises(CalibrationError, match=said):
        prox24.plan(tmp_path / "model", recipe, samples=samples, sequence_length=32, memory=10**12)


def test_a_plan_with_a_refinement_has_the_micro_batch_of_pruning(tmp_path):
    write_tiny(tmp_path / "model")
    recipe = prox24.Recipe(refine=prox24.BlockRefinement(step_tokens=64))
    planned = prox24.plan(tmp_path / "model", recipe, samples=16, sequence_length=32)
    checkpoint = open_checkpoint(tmp_path / "model")
    runner = native_runner(checkpoint, np.zeros((16, 32), np.int32), recipe)
    assert planned.micro_batch_windows == runner.micro_batch == 2


@pytest.mark.parametrize("name", ["samples", "sequence_length", "devices"])
def test_a_number_below_one_is_named(name):
    with pytest.raises(Prox24Error, match=f"{name} is 0, not a positive number"):
        prox24.plan("nowhere", **{name: 0})


def test_no_device_for_a_tensor_is_refused():
    with pytest.raises(Prox24Error, match="tensor_parallel is 0, not a positive number"):
        common_mesh(8, tensor=0)


def test_the_command_says_what_pruning_takes(model, tmp_path, capsys):
    plan = ["plan", tmp_path / "model", "--method", "wanda"]
    plan += ["--samples", "16", "--sequence-length", "32"]
    planned = functools.partial(printed_json, capsys, *plan)
    said = planned("--memory", "1GB")
    assert said["fits"] is True
    assert said["peak_bytes"] == max(said["gather_bytes"], said["solve_bytes"])
    assert said["activation_bytes"] == 16 * 32 * 32 * 4
    tensors = model.checkpoint.tensors.values()
    sizes = [tensor.dtype.itemsize * int(np.prod(tensor.shape)) for tensor in tensors]
    assert said["checkpoint_bytes"] == sum(sizes)
    options = {"samples": 16, "sequence_length": 32, "memory": 10**9}
    assert prox24.plan(tmp_path / "model", WANDA, **options).to_dict() == said
    assert run(*plan, "--memory", "10KB", "--devices", "2") == 0
    printed = capsys.readouterr().out
    assert re.search(r"fits into 0.00 GB +. +no ", printed)
    assert "plan for 2 devices" in printed
    # The devices divide the windows, and the windows fit.
    four = layer_memory(model, 2, WANDA)
    budget = f"{max(four.gather, four.solve) / 1000 + 0.001:.3f}KB"
    rows = planned("--memory", budget, "--devices", "7")
    assert (rows["devices"], rows["micro_batch_windows"], rows["fits"]) == (4, 4, True)
    assert rows["fitting_micro_batch_windows"] == 2
    assert planned("--devices", str(10**12))["devices"] == 16
    columns = planned("--devices", "4", "--shard-grams")
    assert columns["layer_gram_bytes"] == rows["layer_gram_bytes"] / 4
    dense = planned("--devices", "4", "--targets", "dense")
    assert dense["activation_bytes"] == 2 * rows["activation_bytes"]
    assert dense["gather_bytes"] >= rows["gather_bytes"] + 2 * rows["layer_gram_bytes"]
    assert dense["operations"]["forward"] == 1.5 * rows["operations"]["forward"]


def test_a_budget_changes_the_micro_batch_and_not_the_masks(model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    text = prox24.Text(tmp_path / "text.txt", samples=8, sequence_length=32)
    one = layer_memory(model)
    for name, budget in (("plain", None), ("small", max(one.gather, one.solve))):
        prox24.prune(tmp_path / "model", tmp_path / name, WANDA, calibration=text, memory=budget)
    manifest = json.loads((tmp_path / "small" / "prox24.json").read_text())
    assert manifest["micro_batch"] == 1
    plain, small = (open_checkpoint(tmp_path / name) for name in ("plain", "small"))
    for name in plain.tensors:
        np.testing.assert_array_equal(plain.read(name), small.read(name))


# Without weights


def of_json(folder, **changes):
    """Leaves config.json alone in a folder, with changed fields, or without those that are None."""
    config = json.loads((folder / "config.json").read_text()) | changes
    for path in folder.iterdir():
        path.unlink()
    given = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(given))


def numbers(found):
    return dataclasses.replace(found, model="", described_by=None)


@pytest.mark.parametrize("variant", ["tied_head", "gpt2", "mixtral"])
def test_config_json_alone_gives_the_plan_of_the_whole_model(tmp_path, variant):
    write_tiny(tmp_path / "model", variant, dtype="bfloat16")
    options = {"samples": 16, "sequence_length": 32, "memory": 10**9}
    whole = prox24.plan(tmp_path / "model", WANDA, **options)
    of_json(tmp_path / "model")
    found = prox24.plan(tmp_path / "model", WANDA, **options)
    assert (whole.described_by, found.described_by) == (None, "config.json")
    assert numbers(found) == numbers(whole)
    row = re.compile(r"no weights, described by +. +config\.json ")
    assert row.search(str(found))
    assert not row.search(str(whole))
    with pytest.raises(CheckpointError, match="the weights are not here"):
        next(iter(open_described(tmp_path / "model").tensors.values())).read()


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),  # as newer versions of transformers call it
        ({}, "float32"),
        ({"quantization_config": {"quant_method": "fp8"}}, "bfloat16"),
    ],
)
def test_the_dtype_is_that_of_the_config(tmp_path, changes, dtype):
    write_tiny(tmp_path / "model")
    of_json(tmp_path / "model", **{"dtype": None, "torch_dtype": None} | changes)
    assert open_described(tmp_path / "model").tensors[Q_PROJ].dtype == dtype


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"dtype": "float64"}, "config.json has dtype float64; supported are float32"),
        ({"quantization_config": {"quant_method": "awq"}}, "the weights are quantised (awq)"),
        (None, "config.json: there is no such file"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_what_config_json_does_not_describe_is_one_line(tmp_path, capsys, command, changes, said):
    write_tiny(tmp_path / "model")
    of_json(tmp_path / "model", **changes or {})
    if changes is None:
        (tmp_path / "model" / "config.json").unlink()
    assert said in error_line(capsys, command, tmp_path / "model")


def test_a_folder_that_lacks_a_shard_is_refused(tmp_path):
    write_tiny(tmp_path / "model", shards=2)
    (tmp_path / "model" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard .*-00002-of-00002\.safetensors is missing"):
        prox24.plan(tmp_path / "model")


COMMIT = "1" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that a local server shows as OWNER/NAME of the hub, and the bytes it has sent."""
    folder, sent = tmp_path / "served", {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            name = self.path.rpartition("/")[2]
            start, stop = 0, None
            if self.path.startswith("/api/models/owner/name/tree/"):
                files = [(path.name, path.stat().st_size) for path in folder.iterdir()]
                entry = {"type": "file", "oid": "2" * 40}
                listed = [entry | {"path": path, "size": size} for path, size in files]
                body = json.dumps(listed).encode()
            elif self.path.startswith("/api/models/owner/name"):
                body = json.dumps({"id": "owner/name", "sha": COMMIT}).encode()
            elif self.path.startswith("/owner/name/") and (folder / name).is_file():
                body = (folder / name).read_bytes()
                if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""):
                    start, stop = int(asked[1]), int(asked[2]) + 1
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = body[start:stop]
            self.send_response(200 if stop is None else 206)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{name}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                sent[name] = sent.get(name, 0) + len(body)
                self.wfile.write(body)

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants, address = "huggingface_hub.constants", f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(f"{constants}.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield folder, sent
    server.shutdown()
    server.server_close()


def header_bytes(path: Path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("identifier", ["owner/name", f"owner/name@{COMMIT}"])
def test_of_a_model_of_the_hub_headers_alone_are_read(hub, capsys, shards, identifier):
    folder, sent = hub
    # Files of more bytes than the 100,001 with which huggingface_hub asks for a header.
    write_tiny(folder, dtype="float16", shards=shards, vocab_size=10000)
    # An index does not list this tensor, and a single file has it.
    first = next(folder.glob("*.safetensors"))
    save_file(load_file(first) | {"extra": np.zeros(3, np.float16)}, first)
    whole = prox24.plan(folder, WANDA, samples=16, sequence_length=32)
    found = prox24.plan(identifier, WANDA, samples=16, sequence_length=32)
    assert found.described_by == "headers on the hub"
    assert numbers(found) == numbers(whole)
    files = {path.name: path for path in folder.glob("*.safetensors")}
    assert len(files) == shards
    for name, path in files.items():
        assert sent[name] <= max(100_001, header_bytes(path))
    assert max(path.stat().st_size for path in files.values()) > 200_000
    kept = set(sent) - files.keys()
    assert "tokenizer.json" not in kept
    assert not list(Path("cache").rglob("*.safetensors"))
    printed = printed_json(capsys, "inspect", identifier)
    assert printed["described_by"] == "headers on the hub"
    tensors = {entry["name"]: entry["dtype"] for entry in printed["tensors"]}
    assert tensors == {name: "float16" for name in open_checkpoint(folder).tensors}


def test_a_model_in_the_cache_is_opened_and_its_missing_shards_are_described(hub, monkeypatch):
    folder, sent = hub
    write_tiny(folder, shards=2)
    whole = open_checkpoint("owner/name")
    sent.clear()
    cached = open_described("owner/name")
    assert cached.described_by is None
    np.testing.assert_array_equal(cached.read(Q_PROJ), whole.read(Q_PROJ))
    assert not any(name.endswith(".safetensors") for name in sent)
    (whole.path / "model-00001-of-00002.safetensors").unlink()
    assert open_described("owner/name").described_by == "headers on the hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"owner/name .* cannot be had from the hub"):
        open_described("owner/name")


def test_a_model_of_the_hub_without_safetensors_has_the_plan_of_its_config(hub):
    folder, sent = hub
    weights = write_tiny(folder)
    (folder / "model.safetensors").unlink()
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(weights))
    plan = prox24.plan("owner/name", WANDA, sequence_length=32)
    assert plan.described_by == "config.json"
    assert "flax_model.msgpack" not in sent


def test_a_config_of_the_hub_is_refused_before_headers_are_read(hub, capsys):
    folder, sent = hub
    write_tiny(folder)
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    capsys.readouterr()
    assert run("plan", "owner/name") == 2
    # Before it are the progress bars of huggingface_hub.
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("prox24: error: ")
    assert "model_type 'mamba' is not supported" in line
    assert "model.safetensors" not in sent


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"no JSON", "cannot be had from the hub: Failed to parse safetensors header"),
        ({"dtype": "F32", "shape": ["a"]}, "cannot be had from the hub"),
        ({"dtype": "F32", "shape": [-1]}, r"tensor x has shape \(-1,\), as no array has"),
    ],
)
def test_a_broken_header_on_the_hub_is_one_line(hub, header, said):
    folder, _ = hub
    write_tiny(folder)
    if isinstance(header, dict):
        header = json.dumps({"x": header | {"data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=said) as error:
        open_described("owner/name")
    assert "\n" not in str(error.value)
