"""What is read: PyTorch's pickles, Flax's msgpack, float8, and models of the hub."""

import json
import pickle
import struct
import zipfile
from fnmatch import fnmatch

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
from commands import files
from safetensors.numpy import save_file
from tiny import (
    Q_PROJ,
    assert_same,
    config_dict,
    load_folder,
    random_weights,
    write_folder,
    write_tiny,
)

from prox24._checkpoints import flax_file, hub, pickle_file
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._checkpoints.writer import write_checkpoint
from prox24.errors import CheckpointError, DiskError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
STORAGES = {dtype: name.removeprefix("torch.") for name, dtype in pickle_file.STORAGES.items()}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


# A pickle is a program for a stack machine. These write it piece by piece, as torch.save does, so
# that the tests also cover what no pickler would write.


def reference(full):
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def numbers(*values):
    return items(*map(number, values))


def items(*values):
    return b"(" + b"".join(values) + b"t"


def call(function, *arguments):
    return reference(function) + items(*arguments) + b"R"


def entries(pairs):
    return b"}(" + b"".join(text(key) + value for key, value in pairs.items()) + b"u"


def storage(length=6, kind="FloatStorage", key="0"):
    described = (text("storage"), reference(f"torch.{kind}"), text(key), text("cpu"))
    return items(*described, number(length)) + b"Q"


ORDERED_DICT = call("collections.OrderedDict")
NO, YES = b"\x89", b"\x88"
REBUILD = "torch._utils._rebuild_tensor_v2"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, stored=None):
    place = [storage() if stored is None else stored, number(offset)]
    return call(REBUILD, *place, numbers(*shape), numbers(*strides), NO, ORDERED_DICT)


def program(body, protocol=2):
    return b"\x80" + bytes([protocol]) + body + b"."


VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def write_zip(path, body, records=None, compression=zipfile.ZIP_STORED, **others):
    records = {"0": VALUES.tobytes()} if records is None else records
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program(body))
        for record, content in others.items():
            archive.writestr(f"archive/{record}", content)
        for key, content in records.items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def write_legacy(path, body, records=((6, VALUES.tobytes()),), little_endian=True):
    parts = [pickle_file.LEGACY_MAGIC, pickle_file.LEGACY_PROTOCOL]
    stream = b"".join(pickle.dumps(part, 2) for part in parts)
    stream += pickle.dumps({"little_endian": little_endian}, 2) + program(body)
    stream += pickle.dumps([str(key) for key in range(len(records))], 2)
    path.write_bytes(stream + b"".join(struct.pack("<q", n) + content for n, content in records))
    return path


def write_bin(path, weights, tied=None):
    """Writes a state dict as torch.save does, each tensor in a storage of its own."""
    body, records = {}, {}
    for key, (name, values) in enumerate(weights.items()):
        strides = [step // values.itemsize for step in values.strides]
        stored = storage(values.size, STORAGES[values.dtype], str(key))
        body[name] = tensor(values.shape, strides, stored=stored)
        records[str(key)] = values.tobytes()
    body |= {other: body[name] for other, name in (tied or {}).items()}
    return write_zip(path, entries(body), records, version="3\n")


def read_values(path):
    return {name: source.read() for name, source in pickle_file.open_file(path).items()}


# PyTorch's files


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_what_torch_saves_is_read_bit_for_bit(tmp_path, is_zip, protocol):
    torch = pytest.importorskip("torch")
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3), "b": torch.nn.Linear(4, 3)})
    module["b"].weight = module["a"].weight
    saved = module.state_dict()
    saved["parameter"] = torch.nn.Parameter(torch.ones(2))
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        base = (torch.arange(60).reshape(6, 10) % 7).to(dtype)
        views = (base.T, base[2:5, 3:9:2], base[3, 4], base[:0])
        saved |= {f"{dtype}.{index}": view for index, view in enumerate(views)}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip}
    torch.save(saved, tmp_path / "x.bin", **options)
    sources = pickle_file.open_file(tmp_path / "x.bin")
    assert sources.keys() == saved.keys()
    assert sources["a.weight"] is sources["b.weight"]
    assert sources["a.bias"] is not sources["b.bias"]
    for name, source in sources.items():
        values = source.read()
        assert f"torch.{values.dtype}" == str(saved[name].dtype)
        assert values.flags.c_contiguous
        expected = saved[name].detach().float().numpy()
        np.testing.assert_array_equal(values.astype(np.float32), expected)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_tensor_is_read_by_offset_and_strides(tmp_path, write):
    body = {"a": tensor(), "b": tensor((3, 2), (1, 3)), "c": tensor((2,), (2,), 1)}
    body["d"] = tensor((1, 3), (2**31 - 1, 1))  # a stride along one entry is of no effect
    read = read_values(write(tmp_path / "x.bin", entries(body)))
    np.testing.assert_array_equal(read["a"], VALUES)
    np.testing.assert_array_equal(read["b"], VALUES.T)
    np.testing.assert_array_equal(read["c"], [1, 3])
    np.testing.assert_array_equal(read["d"], [[0, 1, 2]])


def test_every_storage_has_its_dtype(tmp_path):
    values = np.array([0, 1, 1, 0, 1], np.uint8)
    saved = {dtype.name: values.astype(dtype) for dtype in STORAGES}
    read = read_values(write_bin(tmp_path / "x.bin", saved))
    assert_same(read, saved)


def test_only_a_tensor_itself_is_read_and_must_still_be_there(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.bin", entries({"x": tensor((2,), (1,), 2)}))
    [source] = pickle_file.open_file(path).values()
    content, fromfile = path.read_bytes(), np.fromfile
    start = content.index(VALUES.tobytes())
    path.write_bytes(content[: start + 16])
    np.testing.assert_array_equal(source.read(), [2, 3])
    monkeypatch.setattr(np, "fromfile", lambda *given, **more: fromfile(*given, **more)[:-1])
    with pytest.raises(DiskError, match=r"x\.bin: the disk fails at byte"):
        source.read()
    path.write_bytes(content[: start + 12])
    with pytest.raises(CheckpointError, match=r"x\.bin became shorter"):
        source.read()


def test_sharded_bin_files_become_as_many_safetensors(tmp_path):
    source, weight_map = tmp_path / "source", {}
    weights = write_tiny(source, "tied_head")
    (source / "model.safetensors").unlink()
    for shard in (1, 2, 3):
        file = f"pytorch_model-{shard:05d}-of-00003.bin"
        part = {name: weights[name] for name in list(weights)[shard - 1 :: 3]}
        tied = {HEAD: EMBEDDING} if EMBEDDING in part else {}
        write_bin(source / file, part, tied)
        weight_map |= dict.fromkeys([*part, *tied], file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (source / "pytorch_model.bin.index.json").write_text(index)
    write_checkpoint(open_checkpoint(source), tmp_path / "out")
    shards = [f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2, 3)]
    models = [name for name in files(tmp_path / "out") if "model" in name]
    assert models == [*shards, "model.safetensors.index.json"]
    assert_same(load_folder(tmp_path / "out"), weights)


def test_a_stored_head_of_a_tied_model_is_tied_if_it_is_the_embedding(tmp_path):
    weights = write_tiny(tmp_path / "source", "tied_head")
    file, values = tmp_path / "source/model.safetensors", weights.pop(EMBEDDING)
    for embedding, head, tied in ((values, values, True), (values, 2 * values, False)):
        save_file(weights | {EMBEDDING: embedding, HEAD: head}, file)
        found = open_checkpoint(tmp_path / "source")
        assert found.decoder.head.tied is tied
        np.testing.assert_array_equal(found.read(HEAD), head)
    # PyTorch's `save_model` keeps the first of two names.
    save_file(weights | {HEAD: values}, file)
    found = open_checkpoint(tmp_path / "source")
    assert found.decoder.head.tied
    np.testing.assert_array_equal(found.read(EMBEDDING), values)


def test_safetensors_are_preferred_then_bin_then_flax(tmp_path):
    folder = tmp_path / "source"
    weights = write_tiny(folder)
    ones, zeros = (
        {name: np.full_like(values, value) for name, values in weights.items()} for value in (1, 0)
    )
    write_bin(folder / "pytorch_model.bin", ones)
    with flax_file.create_file(folder / "flax_model.msgpack", "weight") as put:
        for name, values in zeros.items():
            put(name, values)
    for file, expected in (
        ("model.safetensors", weights),
        ("pytorch_model.bin", ones),
        ("flax_model.msgpack", zeros),
    ):
        np.testing.assert_array_equal(open_checkpoint(folder).read(Q_PROJ), expected[Q_PROJ])
        (folder / file).unlink()


# Pickles that would do something else

INSTANCE = b"(" + text("touch x") + b"ios\nsystem\n"
DOTTED = text("collections") + text("OrderedDict.fromkeys") + b"\x93" + items(text("x")) + b"R"
BOMB = items(b")q\x01", *[b"h\x01h\x01\x86q\x01"] * 60)
"""A tuple of a tuple twice, and so on: 2^60 entries, if it is hashed or printed."""
TRUE_SIZES = (storage(), number(0), items(YES), items(YES), NO, ORDERED_DICT)
PICKLES = [
    ("names os.system,", entries({"x": call("os.system", text("touch x"))})),
    ("names collections.OrderedDict.fromkeys,", entries({"x": DOTTED})),
    ("instruction INST", entries({"x": INSTANCE})),
    ("instruction BYTEARRAY8", b"\x96" + struct.pack("<Q", 2**40)),
    ("takes 0 positional", entries({"x": call("collections.OrderedDict", text("x"))})),
    ("not callable", entries({"x": call("torch.FloatStorage", number(10**9))})),
    ("attributes of something else", tensor() + entries({"shape": numbers(9)}) + b"b"),
    ("neither text nor a number", b"}" + BOMB + tensor() + b"s"),
    ("neither text nor a number", b"](" + text("x") + tensor() + b"u"),
    ("'x' is not a tensor", entries({"x": BOMB})),
    ("1 is not a tensor", b"}(" + number(1) + tensor() + b"u"),
    ("holds no dict", tensor()),
    ("type, key and length", entries({"x": tensor(stored=BOMB + b"Q")})),
    ("type, key and length", entries({"x": tensor(stored=storage(-6))})),
    ("storage, shape and strides", entries({"x": tensor(stored=text("storage"))})),
    ("2 dimensions and 1 strides", entries({"x": tensor((2, 3), (1,))})),
    ("65 dimensions", entries({"x": tensor((1,) * 65, (1,) * 65)})),
    ("not all numbers from 0 on", entries({"x": tensor((2, 3), (-3, 1), 3)})),
    ("not all numbers from 0 on", entries({"x": call(REBUILD, *TRUE_SIZES)})),
    ("storage 1 is missing", entries({"x": tensor(stored=storage(key="1"))})),
    ("storage 0 is truncated", entries({"x": tensor(stored=storage(7))})),
    ("no array has the shape", entries({"x": tensor((0,) + (2**31 - 1,) * 3, (1,) * 4)})),
    ("reaches beyond", entries({"x": tensor(offset=1)})),
    ("reaches beyond", entries({"x": tensor((2**30, 2**30), (0, 0))})),
    ("", b"X" + struct.pack("<I", 2**32 - 1) + b"x"),
    ("", b"\x95" + struct.pack("<Q", 2**62)),
    ("", b"}" + text("x") + tensor() + b"(u"),
    ("", b"R"),
    ("holds no dict", b"](" * 2000 + b"e" * 2000),
]


@pytest.mark.parametrize(("named", "body"), PICKLES, ids=[named for named, _ in PICKLES])
def test_other_pickles_are_refused(tmp_path, monkeypatch, named, body, little_memory):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"x\.bin cannot be read as a state dict: .*{named}"):
        pickle_file.open_file(write_zip(tmp_path / "x.bin", body))
    assert files(tmp_path) == ["x.bin"]  # no command ran


def test_attributes_that_torch_sets_on_a_state_dict_are_ignored(tmp_path, little_memory):
    body = ORDERED_DICT + b"(" + text("x") + tensor() + b"u"
    body += entries({"_metadata": ORDERED_DICT, "items": text("x")}) + b"b"
    body += b"r\xff\xff\xff\x0f"  # a place in the memo that is far away
    np.testing.assert_array_equal(read_values(write_zip(tmp_path / "x.bin", body))["x"], VALUES)


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    path, body = tmp_path / "x.bin", entries({"x": tensor()})
    write_zip(path, body, byteorder="little")
    assert pickle_file.open_file(path).keys() == {"x"}
    keys = b"\x80\x02]q\x00X\x01\x00\x00\x000q\x01a."
    legacy, archive = write_legacy(path, body).read_bytes(), write_zip(path, body).read_bytes()
    compressed = write_zip(path, body, compression=zipfile.ZIP_DEFLATED).read_bytes()
    for named, content in (
        ("is compressed", compressed),
        ("big-endian", write_zip(path, body, byteorder="big").read_bytes()),
        ("big-endian", write_legacy(path, body, little_endian=False).read_bytes()),
        ("stores something else", legacy.replace(keys, b"\x80\x02]" + BOMB + b"a.")),
        ("not written by torch.save", program(number(1))),
        ("has no header", archive[:4] + archive[4:].replace(b"PK\x03\x04", b"PK\x03\x05")),
        ("cannot be read", archive.replace(b"data.pkl", b"data.not")),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=named):
            pickle_file.open_file(path)


# Flax's files


FLAX_PATHS = [
    ("gpt2", "transformer.wte.weight", 2, "transformer/wte/embedding"),
    ("gpt2", "transformer.wpe.weight", 2, "transformer/wpe/embedding"),
    ("gpt2", "transformer.h.0.ln_1.weight", 1, "transformer/h/0/ln_1/scale"),
    ("gpt2", "transformer.h.0.attn.c_attn.bias", 1, "transformer/h/0/attn/c_attn/bias"),
    ("bloom", "transformer.word_embeddings.weight", 2, "transformer/word_embeddings/embedding"),
    ("opt", "decoder.embed_positions.weight", 2, "decoder/embed_positions/embedding"),
    ("llama", "model.embed_tokens.weight", 2, "model/embed_tokens/embedding"),
    ("llama", "model.norm.weight", 1, "model/norm/weight"),
    ("llama", "lm_head.weight", 2, "lm_head/kernel"),
]


@pytest.mark.parametrize(("kind", "name", "dimensions", "path"), FLAX_PATHS)
def test_the_paths_of_flax_files_are_those_of_the_flax_classes(kind, name, dimensions, path):
    assert flax_file.leaf_path(name, dimensions, flax_file.norm_leaf(kind)) == path
    assert flax_file.tensor_name(path) == name


def flax_and_back(folder, variant, dtype, shards):
    weights = write_tiny(folder / "source", variant, dtype, shards)
    source = open_checkpoint(folder / "source")
    write_checkpoint(source, folder / "flax", file_format="flax")
    write_checkpoint(open_checkpoint(folder / "flax"), folder / "back")
    assert_same(load_folder(folder / "back"), weights)
    assert json.loads((folder / "back" / "config.json").read_text()) == source.config
    return weights, {name for name in files(folder / "flax") if "model" in name}


def test_flax_and_back_is_bit_exact_in_chunks_too(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    _, written = flax_and_back(tmp_path, "tied_head", "bfloat16", 1)
    assert written == {"flax_model.msgpack"}
    assert flax_file.CHUNKED.encode() in (tmp_path / "flax" / "flax_model.msgpack").read_bytes()


def test_shards_of_flax_files_have_an_index_of_paths(tmp_path):
    weights, written = flax_and_back(tmp_path, "biases", "float32", 3)
    index = json.loads((tmp_path / "flax" / "flax_model.msgpack.index.json").read_text())
    assert written == {*index["weight_map"].values(), "flax_model.msgpack.index.json"}
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in weights.values())
    shard = index["weight_map"]["model/layers/0/self_attn/q_proj/kernel"]
    tree = flax.serialization.msgpack_restore((tmp_path / "flax" / shard).read_bytes())
    kernel = tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, weights[Q_PROJ].T)


def msgpack_array(shape=(2, 2), dtype="float32", content=bytes(16), code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, content)))


def chunked(*chunks, length=2):
    parts = {str(index): chunk for index, chunk in enumerate(chunks)}
    return {flax_file.CHUNKED: True, "shape": {"0": length}, "chunks": parts}


MSGPACKS = [
    ("max_array_len", b"\xdd\x00\x00\xff\xff" * 1000 + bytes(2**16)),
    ("max_array_len", msgpack.packb([msgpack_array()])),
    ("", b"\x81\xa0" * 5000 + b"\x80"),
    ("", msgpack.packb({1: msgpack_array()})),
    ("dtype 'O'", msgpack.packb({"a": msgpack_array(dtype="O")})),
    ("not that of its entries", msgpack.packb({"a": msgpack_array((-1, 4))})),
    ("not that of its entries", msgpack.packb({"a": msgpack_array((0, 2**62, 4), content=b"")})),
    ("not that of its entries", msgpack.packb({"a": msgpack_array((2, 3))})),
    ("differ in dtype", msgpack.packb({"a": chunked()})),
    ("", msgpack.packb({"a": chunked("x")})),
    ("a is not an array", msgpack.packb({"a": msgpack_array(code=2)})),
    ("kernel has shape", msgpack.packb({"kernel": msgpack_array((4,))})),
]


@pytest.mark.parametrize(("named", "content"), MSGPACKS, ids=[named for named, _ in MSGPACKS])
def test_other_msgpacks_are_refused(tmp_path, named, content, little_memory):
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"flax_model\.msgpack.*{named}"):
        flax_file.open_file(tmp_path / "flax_model.msgpack")


def test_flax_reads_the_same_arrays(tmp_path):
    values = np.arange(6).reshape(2, 3)
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_)
    tree = {np.dtype(dtype).name: values.astype(dtype) for dtype in dtypes}
    content = flax.serialization.msgpack_serialize(dict(tree))
    (tmp_path / "x.msgpack").write_bytes(content)
    read = {name: x.read() for name, x in flax_file.open_file(tmp_path / "x.msgpack").items()}
    assert_same(read, flax.serialization.msgpack_restore(content))


# Quantised weights

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def open_float8(tmp_path, quantization, weight, scale, **more):
    config = config_dict() | {"quantization_config": quantization, "torch_dtype": "bfloat16"}
    weights = random_weights(config) | {Q_PROJ: weight, f"{Q_PROJ}_scale_inv": scale} | more
    weights = {name: values for name, values in weights.items() if values is not None}
    write_folder(tmp_path / "source", config, weights)
    return open_checkpoint(tmp_path / "source")


def quantised(dtype=E4M3):
    values = np.random.default_rng(1).uniform(-200, 200, (32, 32)).astype(np.float32)
    return values.astype(dtype)


BLOCKS = {"quant_method": "fp8", "weight_block_size": [20, 12]}
UNFIT = [([20, 12], (2, 2)), (5, (2, 3)), ([True, 12], (32, 3)), ([0, 12], (2, 3))]


@pytest.mark.parametrize("dtype", [E4M3, np.dtype(ml_dtypes.float8_e5m2)], ids=str)
def test_float8_with_a_scale_for_each_block_is_dequantised(tmp_path, dtype):
    weight = quantised(dtype)
    scale = np.random.default_rng(2).uniform(1e-4, 1e-3, (2, 3)).astype(np.float32)
    activations = {Q_PROJ.replace("weight", "activation_scale"): np.ones((), np.float32)}
    checkpoint = open_float8(tmp_path, BLOCKS, weight, scale, **activations)
    factors = np.repeat(np.repeat(scale, 20, 0)[:32], 12, 1)[:, :32]
    expected = weight.astype(np.float32) * factors
    assert checkpoint.tensors[Q_PROJ].dtype == BFLOAT16
    np.testing.assert_array_equal(checkpoint.read(Q_PROJ), expected.astype(BFLOAT16))
    write_checkpoint(checkpoint, tmp_path / "out")
    written = load_folder(tmp_path / "out")
    assert written.keys() == random_weights(config_dict()).keys()
    np.testing.assert_array_equal(written[Q_PROJ], expected.astype(BFLOAT16))
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_float8_with_one_scale_is_dequantised(tmp_path, shape):
    scale = np.full(shape, 0.01, np.float32)
    read = open_float8(tmp_path, {"quant_method": "fp8"}, quantised(), scale).read(Q_PROJ)
    expected = quantised().astype(np.float32) * np.float32(0.01)
    np.testing.assert_array_equal(read, expected.astype(BFLOAT16))


@pytest.mark.parametrize(
    ("quantization", "shape", "named"),
    [
        (BLOCKS, None, f"{Q_PROJ} is float8_e4m3fn without .* dequantise"),
        *(
            (BLOCKS | {"weight_block_size": b}, x, f"{Q_PROJ}_scale_inv has shape")
            for b, x in UNFIT
        ),
        ({"quant_method": "gptq"}, (), r"quantised \(gptq\).*dequantise"),
        (5, (), "is no JSON object"),
    ],
)
def test_other_quantisations_are_refused_by_name(tmp_path, quantization, shape, named):
    scale = None if shape is None else np.ones(shape, np.float32)
    with pytest.raises(CheckpointError, match=named):
        open_float8(tmp_path, quantization, quantised(), scale)


def test_blocks_that_are_larger_than_a_weight_take_no_memory(tmp_path, little_memory):
    quantization = BLOCKS | {"weight_block_size": [2**62, 1]}
    source = open_float8(tmp_path, quantization, quantised(), np.ones((1, 32), np.float32))
    np.testing.assert_array_equal(source.read(Q_PROJ), quantised().astype(BFLOAT16))


# The hub


@pytest.fixture
def cached_model(tmp_path, monkeypatch):
    """A model in the hub's cache of a machine that is offline."""
    model = tmp_path / "hub" / "models--owner--name"
    for name in ("refs", "snapshots", "blobs"):
        (model / name).mkdir(parents=True)
    for name in ("main", "v1"):
        (model / "refs" / name).write_text("1" * 40)
    folder = model / "snapshots" / ("1" * 40)
    write_tiny(folder)
    for file in list(folder.iterdir()):
        file.rename(model / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("identifier", ["owner/name", "owner/name@v1", "owner/name@" + "1" * 40])
def test_a_cached_model_of_the_hub_is_opened_offline(cached_model, tmp_path, identifier):
    checkpoint = open_checkpoint(identifier)
    assert checkpoint.path == cached_model
    write_checkpoint(checkpoint, tmp_path / "out")
    assert files(tmp_path / "out") == files(cached_model)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("identifier", ["owner/other", "owner/name@v2"])
@pytest.mark.usefixtures("cached_model")
def test_what_the_cache_lacks_is_named_offline(identifier):
    with pytest.raises(CheckpointError, match=f"{identifier} is no folder or .gguf file"):
        open_checkpoint(identifier)


@pytest.mark.usefixtures("cached_model")
def test_a_folder_goes_before_the_hub(tmp_path):
    (tmp_path / "owner").mkdir()
    weights = write_tiny(tmp_path / "owner" / "name", dtype="float16")
    np.testing.assert_array_equal(open_checkpoint("owner/name").read(Q_PROJ), weights[Q_PROJ])


def test_a_cached_model_without_weights_is_refused(cached_model):
    (cached_model / "model.safetensors").unlink()
    # The hub may have them.
    with pytest.raises(CheckpointError, match=r"owner/name is no folder .* cannot be had from the"):
        open_checkpoint("owner/name")


def test_a_model_without_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **options: tmp_path)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **options: None)
    with pytest.raises(CheckpointError, match="owner/name has no weights on the hub: none of pyt"):
        hub.download("owner/name", [pickle_file.FILES])


def test_only_the_preferred_weights_are_downloaded(tmp_path, monkeypatch):
    names = ["model.safetensors", "model-00001-of-00002.safetensors"]
    names += ["model.safetensors-00001-of-00001.safetensors"]
    names += ["pytorch_model.bin", "pytorch_model_00001-of-00072.bin"]
    names += [
        "model.fp16.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "flax_model.msgpack",
    ]
    calls = []

    def snapshot_download(model, *, revision, allow_patterns):
        found = [name for name in names if any(fnmatch(name, own) for own in allow_patterns)]
        calls.append((model, revision, found))
        if "pytorch_model.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    formats = [pickle_file.FILES._replace(stem="model", suffix=".safetensors"), pickle_file.FILES]
    assert hub.download("owner/name@v1", [*formats, flax_file.FILES]) == tmp_path
    assert calls == [("owner/name", "v1", names[:3]), ("owner/name", "v1", names[3:5])]
