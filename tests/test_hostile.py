"""Hostile and damaged files: a sample of `benchmarks/fuzz.py`, and what it and its author found."""

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import flax.serialization
import gguf
import ml_dtypes
import msgpack
import numpy as np
import pytest
from safetensors.numpy import save
from test_formats import call, entries, items, number, tensor, text, write_legacy, write_zip
from test_gguf import SENTENCE_PIECE, write_gguf
from tiny import config_dict, random_weights, write_tiny

from prox24.checkpoints import flax_file, gguf_header, pickle_file
from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.checkpoints.gguf_tokenizer import build_tokenizer
from prox24.checkpoints.hf_folder import read_json
from prox24.errors import CheckpointError, Prox24Error, UnsupportedModelError
from prox24.models.families import config_from_hf

FUZZ = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
MEMORY = 2**20


@pytest.fixture
def little_memory():
    """Fails a test that takes more than a MiB at any time."""
    tracemalloc.start(1)
    before, _ = tracemalloc.get_traced_memory()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < MEMORY


def any_folder(folder, **files):
    """A folder of a model that is not computed, whose weights are read as they are."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "any"}))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def test_mutated_files_are_read_or_refused(tmp_path):
    command = [sys.executable, str(FUZZ), "--count", "200", "--output", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    lines = outcome.stdout.splitlines()
    assert len(lines) == 6, outcome.stdout
    assert all("200 files" in line and " 0 failed" in line for line in lines)
    assert not any(" 0 read" in line for line in lines if not line.startswith("config"))


# JSON


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"[" * 100_000, "nested"),
        (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", "nested in more than 100"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (rb'{"a": "\ud800"}', "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_hostile_json_is_refused(tmp_path, content, named):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json is .*{named}"):
        read_json(tmp_path / "config.json")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        open_checkpoint(tmp_path)


OUTSIDE = ["../elsewhere", "/etc/passwd", "sub/../one", "sub/one", "..", ".", "", 7, None, ["one"]]


@pytest.mark.parametrize("shard", OUTSIDE, ids=str)
def test_an_index_that_points_outside_is_refused(tmp_path, shard):
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    (tmp_path / "elsewhere").write_bytes(save({"a": np.ones(2)}))
    folder = any_folder(tmp_path / "m", model__safetensors__index__json=index)
    with pytest.raises(CheckpointError, match=r"index\.json places tensor a outside the folder"):
        open_checkpoint(folder, any_family=True)


MISSING = r"shard .* (is missing|cannot be read)"


@pytest.mark.parametrize(
    ("shard", "named"),
    [
        ("x" * 300, MISSING),
        ("a\0b", MISSING),
        ("\ud800", r"index\.json is not valid JSON"),
        ("config.json", MISSING),
    ],
)
def test_an_index_that_names_no_shard_is_refused(tmp_path, shard, named):
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    folder = any_folder(tmp_path / "m", model__safetensors__index__json=index)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(folder, any_family=True)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "tokenizer.json", "LICENSE"],
)
def test_a_link_to_outside_the_folder_is_refused(tmp_path, name):
    write_tiny(tmp_path / "source", shards=3)
    file = tmp_path / "source" / name
    file.rename(tmp_path / "elsewhere")
    file.symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to outside the folder"):
        open_checkpoint(tmp_path / "source")


def test_a_link_within_the_folder_is_followed(tmp_path):
    weights = write_tiny(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    file.rename(tmp_path / "source" / "stored")
    file.symlink_to("stored")
    assert open_checkpoint(tmp_path / "source").tensors.keys() == weights.keys()


def test_a_blob_of_the_hub_that_is_a_link_itself_is_refused(tmp_path):
    folder = tmp_path / "model" / "snapshots" / "1"
    folder.parent.mkdir(parents=True)
    write_tiny(folder)
    (tmp_path / "model" / "blobs").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (tmp_path / "model" / "blobs" / "hash").symlink_to("../../elsewhere")
    (folder / "model.safetensors").symlink_to("../../blobs/hash")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to outside"):
        open_checkpoint(folder)


def test_code_in_a_folder_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    write_tiny(tmp_path / "source")
    monkeypatch.setattr("builtins.input", lambda *arguments: pytest.fail("a question"))
    code = f"open({str(tmp_path / 'proof')!r}, 'w')\nclass Own: pass\n"
    (tmp_path / "source" / "own.py").write_text(code)
    for name, maps in {
        "config.json": {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]},
        "tokenizer_config.json": {"AutoTokenizer": ["own.Own", "own.Own"]},
    }.items():
        file = tmp_path / "source" / name
        settings = json.loads(file.read_text()) | {"auto_map": maps, "tokenizer_class": "Own"}
        file.write_text(json.dumps(settings))
    checkpoint = open_checkpoint(tmp_path / "source")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        checkpoint.load_tokenizer()
    assert not (tmp_path / "proof").exists()


# config.json

WRONG_CONFIGS = {
    "more layers than any model": {"num_hidden_layers": 10**9},
    "no layers": {"num_hidden_layers": -1},
    "layers as text": {"num_hidden_layers": "two"},
    "layers as truth": {"num_hidden_layers": True},
    "wide": {"hidden_size": 2**40, "num_attention_heads": 1},
    "wide heads": {"head_dim": 2**40},
    "no heads": {"num_attention_heads": 0},
    "list as an activation": {"hidden_act": ["silu"]},
    "rope of a number": {"rope_parameters": 255},
    "rope of a list": {"rope_parameters": {"rope_type": "linear", "factor": {}}},
    "theta of text": {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    "negative theta": {"rope_parameters": {"rope_type": "default", "rope_theta": -2.0}},
    "more rotation than a head": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        | {"partial_rotary_factor": 1e9}
    },
    "circle of aliases": {"attribute_map": {"hidden_size": "a", "a": "hidden_size"}},
    "dict replaced": {"__dict__": {}},
    "class replaced": {"__class__": "x"},
}


@pytest.mark.parametrize("changes", WRONG_CONFIGS.values(), ids=list(WRONG_CONFIGS))
def test_a_wrong_value_of_a_config_is_refused(changes):
    with pytest.raises(UnsupportedModelError, match=r"llama|rotary"):
        config_from_hf(config_dict() | changes)


@pytest.mark.parametrize("kind", [None, 7, ["llama"], {"llama": 1}])
def test_a_model_type_of_another_kind_is_refused(kind):
    with pytest.raises(UnsupportedModelError, match=r"model_type .* is not supported"):
        config_from_hf({"model_type": kind})


def test_the_alias_of_a_number_of_layers_has_the_limit_too():
    with pytest.raises(UnsupportedModelError, match="n_layer is 1000000000"):
        config_from_hf({"model_type": "gpt2", "n_layer": 10**9})


@pytest.mark.parametrize("field", ["num_key_value_heads", "sliding_window"])
@pytest.mark.parametrize("value", ["gpt2", 0.5, -1, [1], True, 4])
def test_a_field_that_a_family_has_not_means_nothing(field, value):
    plain = {"model_type": "gpt2", "n_head": 8, "n_embd": 64}
    assert config_from_hf(plain | {field: value}) == config_from_hf(plain)


def test_a_llama_has_no_windows_and_rotates_whole_heads():
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    changed = {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2}
    plain = config_dict() | {"rope_parameters": {"rope_theta": 1e4}}
    assert config_from_hf(plain | changed) == config_from_hf(plain)
    assert config_from_hf(plain | {"rope_parameters": rope}) == config_from_hf(plain)


@pytest.mark.parametrize("value", ["gpt2", 0.5, -1, [1], True, 3])
def test_a_number_of_key_heads_is_checked(value):
    with pytest.raises(UnsupportedModelError, match=r"heads of keys|llama"):
        config_from_hf(config_dict() | {"num_key_value_heads": value})


def test_a_token_goes_to_experts_that_there_are():
    with pytest.raises(UnsupportedModelError, match="9 of 4 experts"):
        config_from_hf(config_dict("mixtral") | {"num_local_experts": 4, "num_experts_per_tok": 9})


def test_a_width_of_heads_that_cannot_be_rotated_is_refused():
    with pytest.raises(UnsupportedModelError, match="the config of a llama model"):
        config_from_hf(config_dict() | {"head_dim": 9})


def test_more_experts_than_any_model_has_are_refused():
    with pytest.raises(UnsupportedModelError, match="more than 16384 experts"):
        config_from_hf(config_dict("olmoe", num_hidden_layers=2) | {"num_experts": 10**6})


@pytest.mark.parametrize("extra", [{"num_labels": 10**9}, {"dtype": "load"}, {"torch_dtype": 3}])
def test_what_is_not_used_of_a_config_is_not_read(little_memory, extra):
    assert config_from_hf(config_dict() | extra) == config_from_hf(config_dict())


@pytest.mark.parametrize("value", [5, "fp8", [], 0])
def test_a_quantization_config_of_another_kind_is_refused(tmp_path, value):
    write_tiny(tmp_path / "source")
    config = json.dumps(config_dict() | {"quantization_config": value})
    (tmp_path / "source" / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="quantization_config"):
        open_checkpoint(tmp_path / "source")


def float8_folder(folder, block, scale=(1, 2)):
    weight = np.ones((4, 4), ml_dtypes.float8_e4m3fn)
    content = save({"a.weight": weight, "a.weight_scale_inv": np.full(scale, 3, np.float32)})
    config = {"quant_method": "fp8", "weight_block_size": block}
    any_folder(folder, model__safetensors=content)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def test_blocks_of_float8_that_are_larger_than_the_weight_take_no_memory(tmp_path, little_memory):
    folder = float8_folder(tmp_path / "m", [2**62, 2])
    read = open_checkpoint(folder, any_family=True).read("a.weight")
    np.testing.assert_array_equal(read.astype(np.float32), np.full((4, 4), 3))


@pytest.mark.parametrize("block", [5, "22", [2.0, 2.0], [2, "2"], [True, 2], [0, 2], [[2], 2]])
def test_blocks_of_float8_of_another_kind_are_refused(tmp_path, block):
    folder = float8_folder(tmp_path / "m", block, (2, 2))
    with pytest.raises(CheckpointError, match="does not fit"):
        open_checkpoint(folder, any_family=True)


# safetensors


def test_a_shard_of_another_length_is_refused(tmp_path):
    write_tiny(tmp_path / "source", shards=3)
    shard = tmp_path / "source" / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    for other in (content + b"\0", content[:-1], content[: len(content) // 2], b""):
        shard.write_bytes(other)
        with pytest.raises(CheckpointError, match=rf"shard .*{shard.name} cannot be read"):
            open_checkpoint(tmp_path / "source")


def test_flipped_bytes_of_a_header_are_refused_or_change_no_value(tmp_path):
    values = {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 2), np.float16)}
    content = save(values)
    start = len(content) - sum(array.nbytes for array in values.values())
    folder = any_folder(tmp_path / "m")
    refused = 0
    for position in range(start):
        for mask in (1, 0x80):
            flipped = bytearray(content)
            flipped[position] ^= mask
            (folder / "model.safetensors").write_bytes(flipped)
            try:
                checkpoint = open_checkpoint(folder, any_family=True)
                read = [checkpoint.read(name).tobytes() for name in checkpoint.tensors]
            except CheckpointError:
                refused += 1
            else:
                assert sorted(read) == sorted(array.tobytes() for array in values.values())
    assert refused > start  # of 2 start


def test_a_shape_that_no_array_has_is_refused(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}'
    content = struct.pack("<Q", len(header)) + header
    folder = any_folder(tmp_path / "m", model__safetensors=content)
    with pytest.raises(CheckpointError, match="tensor a has shape"):
        open_checkpoint(folder, any_family=True)


def test_a_large_float64_is_finite(tmp_path):
    folder = any_folder(tmp_path / "m", model__safetensors=save({"a": np.array([1e300])}))
    assert open_checkpoint(folder, any_family=True).read("a") == 1e300


# Pickles

BOMB = items(b")q\x01", *[b"h\x01h\x01\x86q\x01"] * 60)
"""A tuple of a tuple twice, and so on: 2^60 entries, if it is hashed or printed."""
HOSTILE_PICKLES = {
    "large array of bytes": b"\x96" + struct.pack("<Q", 2**40),
    "large bytes": b"\x8e" + struct.pack("<Q", 2**40),
    "long text": b"X" + struct.pack("<I", 2**32 - 1) + b"x",
    "large frame": b"\x95" + struct.pack("<Q", 2**62),
    "bomb as a key": b"}" + BOMB + tensor() + b"s",
    "bomb in a set": b"\x8f(" + BOMB + b"\x90",
    "bomb as a value": entries({"x": BOMB}),
    "bomb as a storage": entries({"x": BOMB + b"Q"}),
    "bomb as a shape": entries(
        {"x": call("torch._utils._rebuild_tensor_v2", tensor(), number(0), BOMB, BOMB)}
    ),
    "empty of a shape that no array has": entries({"x": tensor((0,) + (2**31 - 1,) * 3, (1,) * 4)}),
    "takes from below a mark": b"}" + text("x") + tensor() + b"(u",
    "takes from nothing": b"0000",
    "gets what was not put": b"h\x07",
    "appends to a dict": b"}" + text("x") + b"a",
    "joins numbers to a name": number(1) + number(2) + b"\x93",
    "many arguments": entries({"x": call("torch._utils._rebuild_parameter", *[tensor()] * 9)}),
    "many parts of a storage": entries({"x": tensor(stored=items(*[text("storage")] * 9) + b"Q")}),
    "many dimensions": entries({"x": tensor((1,) * 65, (1,) * 65)}),
    "calls text": text("x") + items() + b"R",
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("body", HOSTILE_PICKLES.values(), ids=list(HOSTILE_PICKLES))
def test_hostile_pickles_are_refused(tmp_path, write, body, little_memory):
    path = write(tmp_path / "bad.bin", body)
    with pytest.raises(CheckpointError, match=r"bad\.bin cannot be read as a state dict"):
        pickle_file.open_file(path)


def test_a_large_memo_takes_no_memory(tmp_path, little_memory):
    path = write_zip(tmp_path / "x.bin", entries({"x": tensor()}) + b"r\xff\xff\xff\x0f")
    assert pickle_file.open_file(path).keys() == {"x"}


def test_a_stride_along_one_entry_may_be_any_number(tmp_path):
    path = write_zip(tmp_path / "x.bin", entries({"x": tensor((1, 3), (2**31 - 1, 1))}))
    [source] = pickle_file.open_file(path).values()
    np.testing.assert_array_equal(source.read(), [[0, 1, 2]])


def test_a_bomb_as_the_key_of_a_storage_is_refused(tmp_path):
    path = write_legacy(tmp_path / "x.bin", entries({"x": tensor()}))
    keys = b"\x80\x02]q\x00X\x01\x00\x00\x000q\x01a."
    content = path.read_bytes()
    assert keys in content
    path.write_bytes(content.replace(keys, b"\x80\x02]" + BOMB + b"a."))
    with pytest.raises(CheckpointError, match="key of a storage"):
        pickle_file.open_file(path)


# Flax


def msgpack_array(shape=(2, 2), dtype="float32", content=bytes(16), code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, content)))


HOSTILE_MSGPACKS = {
    "lists that say that they are long": b"\xdd\x00\x00\xff\xff" * 1000 + bytes(2**16),
    "objects": msgpack.packb({"a": msgpack_array(dtype="O")}),
    "dtype of parts": msgpack.packb({"a": msgpack_array(dtype="(1000000,1000000)f4,f4")}),
    "dtype of a number": msgpack.packb({"a": msgpack_array(dtype=7)}),
    "negative shape": msgpack.packb({"a": msgpack_array((-1, 4))}),
    "shape of truth": msgpack.packb({"a": msgpack_array((True, 4))}),
    "shape that no array has": msgpack.packb({"a": msgpack_array((0, 2**62, 4), content=b"")}),
    "larger shape": msgpack.packb({"a": msgpack_array((2, 3))}),
    "complex": msgpack.packb({"a": msgpack_array(code=2)}),
    "scalar": msgpack.packb({"a": msgpack_array((), code=3)}),
    "other extension": msgpack.packb({"a": msgpack_array(code=77)}),
    "number as a key": msgpack.packb({1: msgpack_array()}),
    "deep": b"\x81\xa0" * 5000 + b"\x80",
    "chunks of text": msgpack.packb(
        {"a": {flax_file.CHUNKED: True, "shape": {"0": 1}, "chunks": {"0": "x"}}}
    ),
    "no chunks": msgpack.packb({"a": {flax_file.CHUNKED: True, "shape": {"0": 0}, "chunks": {}}}),
    "chunks of two dtypes": msgpack.packb(
        {
            "a": {
                flax_file.CHUNKED: True,
                "shape": {"0": 2},
                "chunks": {
                    "0": msgpack_array((1,), content=bytes(4)),
                    "1": msgpack_array((1,), "int64", bytes(8)),
                },
            }
        }
    ),
}


@pytest.mark.parametrize("content", HOSTILE_MSGPACKS.values(), ids=list(HOSTILE_MSGPACKS))
def test_hostile_msgpacks_are_refused(tmp_path, content, little_memory):
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"flax_model\.msgpack"):
        flax_file.open_file(tmp_path / "flax_model.msgpack")


def test_flax_reads_the_same_arrays(tmp_path):
    values = np.arange(6).reshape(2, 3)
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_)
    tree = {np.dtype(dtype).name: values.astype(dtype) for dtype in dtypes}
    content = flax.serialization.msgpack_serialize(dict(tree))
    (tmp_path / "x.msgpack").write_bytes(content)
    read = flax_file.open_file(tmp_path / "x.msgpack")
    for name, expected in flax.serialization.msgpack_restore(content).items():
        assert read[name].dtype == expected.dtype
        np.testing.assert_array_equal(read[name].read(), expected)


# GGUF

LLAMA = {"num_key_value_heads": 2, "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory):
    config = config_dict("grouped_heads", **LLAMA)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, "llama", config, random_weights(config))
    return path


def test_the_header_is_what_the_reader_of_the_gguf_package_finds(gguf_model):
    metadata, tensors = gguf_header.read_header(gguf_model)
    reader = gguf.GGUFReader(gguf_model)
    expected = {name: field.contents() for name, field in reader.fields.items()}
    assert metadata == {name: x for name, x in expected.items() if not name.startswith("GGUF.")}
    assert list(tensors) == [tensor.name for tensor in reader.tensors]
    for stored, found in zip(tensors.values(), reader.tensors, strict=True):
        place = (found.tensor_type, tuple(found.shape[::-1]), found.data_offset, found.n_bytes)
        assert stored == place


def text_of_gguf(value):
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_with(path, fields, tensors=b"", count=0, version=3):
    body = b"".join(text_of_gguf(name) + value for name, value in fields.items())
    head = struct.pack("<4sIQQ", b"GGUF", version, count, len(fields))
    path.write_bytes(head + body + tensors)
    return path


def gguf_tensor(name="a", shape=(32,), kind=0, start=0):
    form = f"<I{len(shape)}QIQ"
    return text_of_gguf(name) + struct.pack(form, len(shape), *shape, kind, start)


HOSTILE_GGUFS = {
    "endless truths": ({"a": struct.pack("<IIQ", 9, 7, 2**60)}, b"", 0),
    "endless texts": ({"a": struct.pack("<IIQ", 9, 8, 2**60)}, b"", 0),
    "endless lists": ({"a": struct.pack("<IIQ", 9, 9, 2**60)}, b"", 0),
    "list in a list": ({"a": struct.pack("<IIQIQ", 9, 9, 1, 0, 0)}, b"", 0),
    "long text": ({"a": struct.pack("<IQ", 8, 2**63)}, b"", 0),
    "type that there is not": ({"a": struct.pack("<I", 99)}, b"", 0),
    "text that is none": ({"a": struct.pack("<IQ", 8, 1) + b"\xff"}, b"", 0),
    "alignment of 0": ({"general.alignment": struct.pack("<II", 4, 0)}, b"", 0),
    "alignment of 3": ({"general.alignment": struct.pack("<II", 4, 3)}, b"", 0),
    "alignment of text": ({"general.alignment": struct.pack("<IQ", 8, 0)}, b"", 0),
    "more tensors than there are": ({}, gguf_tensor(), 2**60),
    "tensor beyond the end": ({}, gguf_tensor(shape=(2**40,)), 1),
    "tensor far beyond the end": ({}, gguf_tensor(start=2**63), 1),
    "tensor of nothing": ({}, gguf_tensor(shape=(0, 2**62)), 1),
    "product that overflows": ({}, gguf_tensor(shape=(2**32, 2**32)), 1),
    "many dimensions": ({}, gguf_tensor(shape=(1,) * 64), 1),
    "no dimension": ({}, gguf_tensor(shape=()), 1),
    "row of half a block": ({}, gguf_tensor(shape=(16, 2), kind=8), 1),
    "kind that there is not": ({}, gguf_tensor(kind=9999), 1),
    "tensor twice": ({}, gguf_tensor() * 2, 2),
    "overlap": ({}, gguf_tensor("a") + gguf_tensor("b") + gguf_tensor("c") + bytes(160), 3),
}


@pytest.mark.parametrize(
    ("fields", "tensors", "count"), HOSTILE_GGUFS.values(), ids=list(HOSTILE_GGUFS)
)
def test_hostile_ggufs_are_refused(tmp_path, fields, tensors, count, little_memory):
    path = gguf_with(tmp_path / "model.gguf", fields, tensors, count)
    with pytest.raises(CheckpointError, match=r"model\.gguf is not a readable GGUF file"):
        open_checkpoint(path)


def test_a_list_of_numbers_takes_little_more_memory_than_the_file(tmp_path):
    content = struct.pack("<IIQ", 9, 0, 10**6) + bytes(10**6)
    path = gguf_with(tmp_path / "model.gguf", {"a": content})
    tracemalloc.start(1)
    metadata, _ = gguf_header.read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert metadata == {"a": [0] * 10**6}
    assert peak < 20 * 10**6


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("llama.attention.head_count", struct.pack("<II", 4, 0), "head_count is 0"),
        ("llama.attention.head_count", struct.pack("<IQ", 8, 0), "head_count' is no int"),
        ("llama.attention.head_count", struct.pack("<IIQII", 9, 4, 2, 4, 4), "is no int"),
        ("llama.attention.head_count_kv", struct.pack("<II", 4, 3), "rows of blk.0.attn_k.weight"),
        ("llama.block_count", struct.pack("<II", 4, 2**32 - 1), "num_hidden_layers is 4294967295"),
        ("llama.embedding_length", struct.pack("<If", 6, 32.0), "embedding_length' is no int"),
        ("llama.rope.freq_base", struct.pack("<II", 4, 100), "freq_base' is no float"),
        ("general.architecture", struct.pack("<IIQ", 9, 4, 0), r"architecture \[\]"),
    ],
)
def test_wrong_metadata_of_a_gguf_are_named(tmp_path, gguf_model, name, value, named):
    # The field in its place is renamed, and the wrong one is put first.
    content = gguf_model.read_bytes().replace(name.encode(), b"x" * len(name))
    magic, version, tensors, fields = struct.unpack("<4sIQQ", content[:24])
    wrong = text_of_gguf(name) + value
    wrong += text_of_gguf("fill") + struct.pack("<IQ", 8, 0)
    padding = -(len(wrong)) % 32
    wrong = wrong[:-8] + struct.pack("<Q", padding) + b"x" * padding
    head = struct.pack("<4sIQQ", magic, version, tensors, fields + 2)
    (tmp_path / "model.gguf").write_bytes(head + wrong + content[24:])
    with pytest.raises(Prox24Error, match=named):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_truncated_gguf_is_refused_wherever_it_ends(tmp_path, gguf_model):
    content = gguf_model.read_bytes()
    for length in [*range(0, 3000, 7), *range(3000, len(content), 1001), len(content) - 1]:
        (tmp_path / "model.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.gguf is not a readable GGUF file"):
            open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.token_type": None},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.scores": "abc"},
        {"tokenizer.ggml.tokens": [1, 2]},
        {"tokenizer.ggml.tokens": []},
        {"tokenizer.ggml.tokens": ["a" * 10**6]},
        {"tokenizer.ggml.bos_token_id": 10**6},
        {"tokenizer.ggml.unknown_token_id": "x"},
        {"tokenizer.ggml.model": ["llama"]},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": []},
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.merges": ["no merge of it"],
        },
    ],
)
def test_a_tokenizer_that_the_metadata_do_not_describe_is_refused(changes):
    changed = SENTENCE_PIECE | changes
    metadata = {name: value for name, value in changed.items() if value is not None}
    with pytest.raises(CheckpointError, match=r"model\.gguf: (the )?tokenizer"):
        build_tokenizer(metadata, 64, Path("model.gguf"))
