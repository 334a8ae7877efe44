"""What is read: PyTorch's pickles, Flax's msgpack, float8, and models of the hub."""

import json
import pickle
import struct
import zipfile

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import config_dict, random_weights, write_folder, write_tiny

from prox24.checkpoints import flax_file, hub, pickle_file
from prox24.checkpoints.checkpoint import open_checkpoint, parameter_shapes
from prox24.checkpoints.writer import write_checkpoint
from prox24.errors import CheckpointError, DiskError, UnsupportedModelError

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
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


def storage(length=6, kind="FloatStorage", key="0", *part):
    described = (
        text("storage"),
        reference(f"torch.{kind}"),
        text(key),
        text("cpu"),
        number(length),
    )
    return items(*described, *part) + b"Q"


ORDERED_DICT = call("collections.OrderedDict")
NO, YES, NONE = b"\x89", b"\x88", b"N"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, stored=None):
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage() if stored is None else stored,
        number(offset),
        numbers(*shape),
        numbers(*strides),
        NO,
        ORDERED_DICT,
    )


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


def write_bin(path, weights):
    """Writes a state dict as torch.save does, each tensor in a storage of its own."""
    body, records = {}, {}
    for key, (name, values) in enumerate(weights.items()):
        strides = [step // values.itemsize for step in values.strides]
        stored = storage(values.size, STORAGES[values.dtype], str(key))
        body[name] = tensor(values.shape, strides, stored=stored)
        records[str(key)] = values.tobytes()
    return write_zip(path, entries(body), records, version="3\n")


def read_values(path):
    return {name: source.read() for name, source in pickle_file.open_file(path).items()}


# PyTorch's files


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "bool"])
def test_what_torch_saves_is_read_bit_for_bit(tmp_path, dtype, is_zip):
    torch = pytest.importorskip("torch")
    base = (torch.arange(60).reshape(6, 10) % 7).to(getattr(torch, dtype))
    saved = {
        "plain": base.clone(),
        "transposed": base.clone().T,
        "part": base.clone()[2:5, 3:9:2],
        "repeated_rows": base.clone()[::2],
        "scalar": base.clone()[3, 4],
        "empty": base.clone()[:0],
    }
    torch.save(saved, tmp_path / "x.bin", _use_new_zipfile_serialization=is_zip)
    read = read_values(tmp_path / "x.bin")
    assert read.keys() == saved.keys()
    for name, values in saved.items():
        assert read[name].dtype.name == dtype
        assert read[name].shape == tuple(values.shape)
        assert read[name].flags.c_contiguous
        bits = values.contiguous().view(torch.uint8 if values.ndim else values.dtype)
        expected = values.float().numpy()
        np.testing.assert_array_equal(read[name].astype(np.float32), expected)
        assert read[name].nbytes == bits.numel() * bits.element_size()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_module_with_tied_parameters_is_read(tmp_path, is_zip):
    torch = pytest.importorskip("torch")
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3), "b": torch.nn.Linear(4, 3)})
    module["b"].weight = module["a"].weight
    saved = module.state_dict() | {"c": torch.nn.Parameter(torch.ones(2))}
    torch.save(saved, tmp_path / "x.bin", _use_new_zipfile_serialization=is_zip)
    sources = pickle_file.open_file(tmp_path / "x.bin")
    assert sources.keys() == {"a.weight", "a.bias", "b.weight", "b.bias", "c"}
    assert sources["a.weight"] is sources["b.weight"]
    assert sources["a.bias"] is not sources["b.bias"]
    for name, values in saved.items():
        np.testing.assert_array_equal(sources[name].read(), values.detach().numpy())


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_newer_protocol_of_pickles_is_read(tmp_path, is_zip):
    torch = pytest.importorskip("torch")
    saved = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64)}
    options = {"pickle_protocol": 4, "_use_new_zipfile_serialization": is_zip}
    torch.save(saved, tmp_path / "x.bin", **options)
    read = read_values(tmp_path / "x.bin")
    for name, values in saved.items():
        np.testing.assert_array_equal(read[name], values.numpy())


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_tensor_is_read_by_offset_and_strides(tmp_path, write):
    body = entries({"a": tensor(), "b": tensor((3, 2), (1, 3)), "c": tensor((2,), (2,), 1)})
    read = read_values(write(tmp_path / "x.bin", body))
    np.testing.assert_array_equal(read["a"], VALUES)
    np.testing.assert_array_equal(read["b"], VALUES.T)
    np.testing.assert_array_equal(read["c"], [1, 3])


@pytest.mark.parametrize("dtype", list(STORAGES), ids=str)
def test_every_storage_has_its_dtype(tmp_path, dtype):
    values = np.array([0, 1, 1, 0, 1], np.uint8).astype(dtype)
    read = read_values(write_bin(tmp_path / "x.bin", {"x": values}))["x"]
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values)


def test_nothing_but_the_tensor_itself_is_read(tmp_path):
    path = write_zip(tmp_path / "x.bin", entries({"x": tensor((2,), (1,), 2)}))
    [source] = pickle_file.open_file(path).values()
    content = path.read_bytes()
    path.write_bytes(content[: content.index(VALUES.tobytes()) + 16])
    np.testing.assert_array_equal(source.read(), [2, 3])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_folder_with_a_bin_file_is_converted_bit_for_bit(tmp_path, dtype):
    weights = write_tiny(tmp_path / "source", dtype=dtype)
    (tmp_path / "source" / "model.safetensors").unlink()
    write_bin(tmp_path / "source" / "pytorch_model.bin", weights)
    write_checkpoint(open_checkpoint(tmp_path / "source"), tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), weights)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def assert_same(read, weights):
    assert read.keys() == weights.keys()
    for name, values in weights.items():
        assert read[name].dtype == values.dtype
        assert read[name].tobytes() == values.tobytes()


def write_sharded_bins(folder, weights, count=3):
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(count):
        file = f"pytorch_model-{shard + 1:05d}-of-{count:05d}.bin"
        part = {name: weights[name] for name in list(weights)[shard::count]}
        write_bin(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_sharded_bin_files_become_as_many_safetensors(tmp_path):
    weights = write_tiny(tmp_path / "source")
    write_sharded_bins(tmp_path / "source", weights)
    write_checkpoint(open_checkpoint(tmp_path / "source"), tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2, 3)
    ]
    assert not list((tmp_path / "out").glob("pytorch_model*"))
    read = {}
    for shard in shards:
        read |= load_file(shard)
    assert_same(read, weights)


def test_a_missing_shard_of_bins_is_named(tmp_path):
    write_sharded_bins(tmp_path / "source", write_tiny(tmp_path / "source"))
    (tmp_path / "source" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00003\.bin is missing"):
        open_checkpoint(tmp_path / "source")


def test_a_tied_head_of_a_bin_file_stays_one_tensor(tmp_path):
    weights = write_tiny(tmp_path / "source", "tied_head")
    (tmp_path / "source" / "model.safetensors").unlink()
    body, records = {}, {}
    for key, (name, values) in enumerate(weights.items()):
        strides = [step // values.itemsize for step in values.strides]
        body[name] = tensor(values.shape, strides, stored=storage(values.size, key=str(key)))
        records[str(key)] = values.tobytes()
    body[HEAD] = body[EMBEDDING]
    write_zip(tmp_path / "source" / "pytorch_model.bin", entries(body), records)
    write_checkpoint(open_checkpoint(tmp_path / "source"), tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), weights)


def test_a_float64_weight_is_refused_by_name(tmp_path):
    weights = write_tiny(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    changed = weights | {Q_PROJ: weights[Q_PROJ].astype(np.float64)}
    write_bin(tmp_path / "source" / "pytorch_model.bin", changed)
    with pytest.raises(CheckpointError, match=f"{Q_PROJ} has dtype float64"):
        open_checkpoint(tmp_path / "source")


def test_safetensors_are_preferred_then_bin_then_flax(tmp_path):
    weights = write_tiny(tmp_path / "source")
    folder = tmp_path / "source"
    ones = {name: np.ones_like(values) for name, values in weights.items()}
    write_bin(folder / "pytorch_model.bin", ones)
    zeros = {name: np.zeros_like(values) for name, values in weights.items()}
    with flax_file.create_file(folder / "flax_model.msgpack", "weight") as put:
        for name, values in zeros.items():
            put(name, values)
    np.testing.assert_array_equal(open_checkpoint(folder).read(Q_PROJ), weights[Q_PROJ])
    (folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(open_checkpoint(folder).read(Q_PROJ), ones[Q_PROJ])
    (folder / "pytorch_model.bin").unlink()
    np.testing.assert_array_equal(open_checkpoint(folder).read(Q_PROJ), zeros[Q_PROJ])


# Pickles that would do something else


def touch(full):
    return lambda path: entries({"x": call(full, text(f"touch {path}"))})


def evaluate(path):
    return entries({"x": call("builtins.eval", text(f"open({str(path)!r}, 'w')"))})


def old_eval(path):
    return entries({"x": call("__builtin__.eval", text(f"open({str(path)!r}, 'w')"))})


def instance(path):
    return entries({"x": b"(" + text(f"touch {path}") + b"ios\nsystem\n"})


def dotted(path):
    function = text("collections") + text("OrderedDict.fromkeys") + b"\x93"
    return entries({"x": function + items(text(str(path))) + b"R"})


def of_torch(path):
    return entries({"x": call("torch.load", text(str(path)))})


def of_this_module(path):
    return entries({"x": call("prox24.checkpoints.pickle_file.open_file", text(str(path)))})


NAMED = {
    touch("os.system"): "os.system",
    touch("posix.system"): "posix.system",
    touch("subprocess.getoutput"): "subprocess.getoutput",
    evaluate: "builtins.eval",
    old_eval: "__builtin__.eval",
    instance: "INST",
    dotted: "OrderedDict.fromkeys",
    of_torch: "torch.load",
    of_this_module: "pickle_file.open_file",
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(("make", "refused"), NAMED.items(), ids=list(NAMED.values()))
def test_no_other_nameis_called(tmp_path, write, make, refused):
    body = make(tmp_path / "proof")
    with pytest.raises(CheckpointError, match=rf"(names|instruction) .*{refused}, which"):
        pickle_file.open_file(write(tmp_path / "x.bin", body))
    assert not (tmp_path / "proof").exists()


def test_those_pickles_do_run_code_where_nothing_refuses(tmp_path):
    pickle.loads(program(touch("os.system")(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()


def described(kind, storage_type):
    return items(kind, storage_type, text("0"), text("cpu"), number(6)) + b"Q"


def built(made, state):
    return entries({"x": made + state + b"b"})


REBUILD = reference("torch._utils._rebuild_tensor_v2")
ATTRIBUTES = entries({"function": ORDERED_DICT, "__defaults__": items(NO, NO)})
BAD_PROGRAMS = {
    "dict with arguments": entries({"x": call("collections.OrderedDict", text("x"))}),
    "tensor of nothing": entries({"x": call("torch._utils._rebuild_tensor_v2")}),
    "tensor of text": entries({"x": tensor(stored=text("storage"))}),
    "tensor of a storage class": entries({"x": tensor(stored=reference("torch.FloatStorage"))}),
    "parameter of text": entries({"x": call("torch._utils._rebuild_parameter", text("x"), NO, NO)}),
    "storage class called": entries({"x": call("torch.FloatStorage", number(10**9))}),
    "storage class made": entries({"x": reference("torch.FloatStorage") + items() + b"\x81"}),
    "function made": entries({"x": REBUILD + items() + b"\x81"}),
    "function altered": built(REBUILD, ATTRIBUTES),
    "function's attributes altered": built(REBUILD, items(NONE, ATTRIBUTES)),
    "class altered": built(reference("collections.OrderedDict"), ATTRIBUTES),
    "class's attributes altered": built(
        reference("collections.OrderedDict"), items(NONE, entries({"__setstate__": REBUILD}))
    ),
    "tensor altered": built(tensor(), entries({"shape": numbers(9)})),
    "tensor's attributes altered": built(tensor(), items(NONE, entries({"shape": numbers(9)}))),
    "storage class altered": built(
        reference("torch.FloatStorage"), items(NONE, entries({"dtype": text("O")}))
    ),
    "nested persistent id": entries(
        {
            "x": tensor(
                stored=items(
                    text("storage"),
                    reference("torch.FloatStorage"),
                    storage(),
                    text("cpu"),
                    number(6),
                )
                + b"Q"
            )
        }
    ),
    "persistent id of text": entries({"x": tensor(stored=text("0") + b"Q")}),
    "old persistent id": entries({"x": tensor(stored=b"P0\n")}),
    "storage of an unknown kind": entries(
        {"x": tensor(stored=described(text("module"), reference("torch.FloatStorage")))}
    ),
    "storage in place of its class": entries(
        {"x": tensor(stored=described(text("storage"), storage()))}
    ),
    "storage with a view of another": entries(
        {"x": tensor(stored=storage(6, "FloatStorage", "0", items(text("1"), number(0))))}
    ),
    "negative length": entries({"x": tensor(stored=storage(-6))}),
    "extension": entries({"x": b"\x82\x01"}),
    "negative stride": entries({"x": tensor((2, 3), (-3, 1), 3)}),
    "negative size": entries({"x": tensor((-2, 3))}),
    "negative offset": entries({"x": tensor(offset=-1)}),
    "offset beyond": entries({"x": tensor(offset=1)}),
    "offset of nothing beyond": entries({"x": tensor((0, 3), offset=7)}),
    "stride beyond": entries({"x": tensor((2, 3), (4, 1))}),
    "shape beyond": entries({"x": tensor((3, 3))}),
    "shape larger than the memory": entries({"x": tensor((2**30, 2**30), (0, 0))}),
    "truth as a size": entries(
        {
            "x": call(
                "torch._utils._rebuild_tensor_v2",
                storage(),
                number(0),
                items(YES),
                items(YES),
                NO,
                ORDERED_DICT,
            )
        }
    ),
    "shape without strides": entries({"x": tensor((2, 3), (1,))}),
    "too many dimensions": entries({"x": tensor((1,) * 100, (1,) * 100)}),
    "storage longer than its record": entries({"x": tensor(stored=storage(7))}),
    "missing record": entries({"x": tensor(stored=storage(key="1"))}),
    "complex storage": entries({"x": tensor(stored=storage(3, "ComplexFloatStorage"))}),
    "list": b"]",
    "number as a value": entries({"x": number(1)}),
    "nested dict": entries({"model": entries({"x": tensor()})}),
    "number as a name": b"}(" + number(1) + tensor() + b"u",
    "tensor alone": tensor(),
    "unfinished": b"}(",
    "endless": b"\x8a",
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("body", BAD_PROGRAMS.values(), ids=list(BAD_PROGRAMS))
def test_other_pickles_are_refused_and_leave_no_trace(tmp_path, write, body):
    with pytest.raises(CheckpointError, match=r"bad\.bin"):
        read_values(write(tmp_path / "bad.bin", body))
    for function in pickle_file.FUNCTIONS.values():
        assert vars(function) == {}
    good = entries({"x": call("torch._utils._rebuild_parameter", tensor(), YES, ORDERED_DICT)})
    np.testing.assert_array_equal(read_values(write(tmp_path / "good.bin", good))["x"], VALUES)


def test_attributes_that_torch_sets_on_a_state_dict_are_ignored(tmp_path):
    body = ORDERED_DICT + b"(" + text("x") + tensor() + b"u"
    body += entries({"_metadata": ORDERED_DICT, "items": text("x")}) + b"b"
    np.testing.assert_array_equal(read_values(write_zip(tmp_path / "x.bin", body))["x"], VALUES)


def test_a_truncated_zip_is_refused_wherever_it_ends(tmp_path):
    path = write_zip(tmp_path / "x.bin", entries({"x": tensor()}))
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"x\.bin"):
            pickle_file.open_file(path)


def test_a_truncated_legacy_file_is_refused_wherever_it_ends(tmp_path):
    path = write_legacy(tmp_path / "x.bin", entries({"x": tensor()}))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"x\.bin"):
            pickle_file.open_file(path)


def test_a_file_that_becomes_shorter_is_noticed_when_read(tmp_path):
    path = write_zip(tmp_path / "x.bin", entries({"x": tensor()}))
    [source] = pickle_file.open_file(path).values()
    content = path.read_bytes()
    path.write_bytes(content[: content.index(VALUES.tobytes()) + 8])
    with pytest.raises(CheckpointError, match="became shorter"):
        source.read()


def test_a_file_that_the_disk_fails_to_read_is_not_a_shorter_one(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.bin", entries({"x": tensor()}))
    [source] = pickle_file.open_file(path).values()
    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *given, **more: fromfile(*given, **more)[:-1])
    with pytest.raises(DiskError, match=r"x\.bin: the disk fails at byte"):
        source.read()


def test_a_compressed_archive_is_refused(tmp_path):
    body = entries({"x": tensor()})
    path = write_zip(tmp_path / "x.bin", body, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        pickle_file.open_file(path)


def test_a_zip_without_a_pickle_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/other", b"")
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        pickle_file.open_file(tmp_path / "x.bin")


def test_big_endian_files_are_refused(tmp_path):
    body = entries({"x": tensor()})
    with pytest.raises(CheckpointError, match="big-endian"):
        pickle_file.open_file(write_zip(tmp_path / "x.bin", body, byteorder="big"))
    with pytest.raises(CheckpointError, match="big-endian"):
        pickle_file.open_file(write_legacy(tmp_path / "x.bin", body, little_endian=False))
    pickle_file.open_file(write_zip(tmp_path / "x.bin", body, byteorder="little"))


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\x93NUMPY")
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        pickle_file.open_file(tmp_path / "x.bin")


# Flax's files

GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 12}
BLOOM = {"model_type": "bloom", "hidden_size": 8, "n_head": 2, "n_layer": 1, "vocab_size": 12}
OPT = {
    "model_type": "opt",
    "hidden_size": 8,
    "word_embed_proj_dim": 8,
    "ffn_dim": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 12,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 12,
    "tie_word_embeddings": False,
}
LEAVES = {
    "gpt2": (
        GPT2,
        {
            "transformer/wte/embedding": (12, 8),
            "transformer/wpe/embedding": (1024, 8),
            "transformer/h/0/ln_1/scale": (8,),
            "transformer/h/0/attn/c_attn/kernel": (24, 8),
            "transformer/h/0/attn/c_attn/bias": (24,),
            "transformer/h/0/mlp/c_fc/kernel": (32, 8),
            "transformer/ln_f/bias": (8,),
        },
    ),
    "bloom": (
        BLOOM,
        {
            "transformer/word_embeddings/embedding": (12, 8),
            "transformer/word_embeddings_layernorm/scale": (8,),
            "transformer/h/0/self_attention/query_key_value/kernel": (8, 24),
            "transformer/h/0/mlp/dense_4h_to_h/kernel": (32, 8),
        },
    ),
    "opt": (
        OPT,
        {
            "model/decoder/embed_tokens/embedding": (12, 8),
            "model/decoder/embed_positions/embedding": (2050, 8),
            "model/decoder/layers/0/self_attn_layer_norm/scale": (8,),
            "model/decoder/layers/0/fc1/kernel": (8, 16),
        },
    ),
    "llama": (
        LLAMA,
        {
            "model/embed_tokens/embedding": (12, 8),
            "model/layers/0/input_layernorm/weight": (8,),
            "model/layers/0/mlp/up_proj/kernel": (8, 16),
            "model/norm/weight": (8,),
            "lm_head/kernel": (8, 12),
        },
    ),
}


def arrays(config):
    generator = np.random.default_rng(5)
    shapes = parameter_shapes(config, ())
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", LEAVES)
def test_flax_files_have_the_leaves_of_the_flax_classes(tmp_path, kind):
    config, expected = LEAVES[kind]
    weights = arrays(config)
    write_folder(tmp_path / "source", config, weights)
    source = open_checkpoint(tmp_path / "source")
    write_checkpoint(source, tmp_path / "out", file_format="flax")
    tree = flax.serialization.msgpack_restore(
        (tmp_path / "out" / "flax_model.msgpack").read_bytes()
    )
    leaves = flax.traverse_util.flatten_dict(tree, sep="/")
    assert {flax_file.tensor_name(path) for path in leaves} == weights.keys()
    assert {path: leaves[path].shape for path in expected} == expected
    for path, values in leaves.items():
        stored = weights[flax_file.tensor_name(path)]
        np.testing.assert_array_equal(values, stored.T if path.endswith("kernel") else stored)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", ["llama1", "tied_head", "biases"])
def test_flax_and_back_is_bit_exact(tmp_path, dtype, shards, variant):
    config = config_dict(variant) | {"torch_dtype": dtype}
    weights = random_weights(config, BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype))
    write_folder(tmp_path / "source", config, weights, shards)
    source = open_checkpoint(tmp_path / "source")
    write_checkpoint(source, tmp_path / "flax", file_format="flax")
    assert not list((tmp_path / "flax").glob("*.safetensors"))
    assert len(list((tmp_path / "flax").glob("*.msgpack"))) == shards
    write_checkpoint(open_checkpoint(tmp_path / "flax"), tmp_path / "back")
    read = {}
    for shard in (tmp_path / "back").glob("*.safetensors"):
        read |= load_file(shard)
    assert_same(read, weights)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == source.config


def test_the_index_of_flax_files_has_paths(tmp_path):
    write_tiny(tmp_path / "source", shards=3)
    source = open_checkpoint(tmp_path / "source")
    write_checkpoint(source, tmp_path / "flax", file_format="flax")
    index = json.loads((tmp_path / "flax" / "flax_model.msgpack.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        v.nbytes for v in random_weights(source.config).values()
    )
    shard = index["weight_map"]["model/layers/0/self_attn/q_proj/kernel"]
    tree = flax.serialization.msgpack_restore((tmp_path / "flax" / shard).read_bytes())
    kernel = tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, source.read(Q_PROJ).T)


def test_arrays_that_flax_cut_into_chunks_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    weights = write_tiny(tmp_path / "source")
    write_checkpoint(open_checkpoint(tmp_path / "source"), tmp_path / "flax", file_format="flax")
    written = (tmp_path / "flax" / "flax_model.msgpack").read_bytes()
    assert b"__msgpack_chunked_array__" in written
    flax_checkpoint = open_checkpoint(tmp_path / "flax")
    np.testing.assert_array_equal(flax_checkpoint.read(Q_PROJ), weights[Q_PROJ])


def test_buffers_are_left_out_of_flax_files(tmp_path):
    config = config_dict()
    weights = random_weights(config)
    write_folder(tmp_path / "source", config, weights | {"model.position_ids": np.arange(4)})
    source = open_checkpoint(tmp_path / "source")
    written = write_checkpoint(source, tmp_path / "flax", file_format="flax")
    assert set(written) == weights.keys()
    assert open_checkpoint(tmp_path / "flax").tensors.keys() == weights.keys()


def test_a_model_without_a_flax_class_is_refused(tmp_path):
    heads = LLAMA["num_attention_heads"]
    config = LLAMA | {"model_type": "qwen2", "num_key_value_heads": heads}
    write_folder(tmp_path / "source", config, arrays(config))
    source = open_checkpoint(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=r"no Flax class .*'qwen2'.*llama"):
        write_checkpoint(source, tmp_path / "out", file_format="flax")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def flax_folder(folder, tree):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    return folder


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"model": {"step": 3}}, "model/step is not an array"),
        ({"conv": {"kernel": np.zeros((2, 2, 2))}}, "conv/kernel has shape"),
        ([np.zeros(2)], "cannot be read as msgpack"),
        ({}, "is missing"),
    ],
)
def test_other_msgpack_files_are_refused(tmp_path, tree, named):
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(flax_folder(tmp_path / "source", tree))


def test_a_truncated_msgpack_file_is_refused(tmp_path):
    folder = flax_folder(tmp_path / "source", {"model": {"kernel": np.zeros((4, 4), np.float32)}})
    content = (folder / "flax_model.msgpack").read_bytes()
    for length in range(len(content)):
        (folder / "flax_model.msgpack").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"flax_model\.msgpack"):
            open_checkpoint(folder)


# Quantised weights

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def write_float8(path, tensors):
    """Writes a safetensors file with float8, which safetensors.numpy does not know."""
    names = {
        np.dtype(np.float32): "F32",
        E4M3: "F8_E4M3",
        np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    }
    header, content = {}, b""
    for name, values in tensors.items():
        offsets = [len(content), len(content) + values.nbytes]
        header[name] = {
            "dtype": names[values.dtype],
            "shape": values.shape,
            "data_offsets": offsets,
        }
        content += values.tobytes()
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content)


def float8_folder(folder, changes, quantization):
    config = config_dict() | {"quantization_config": quantization, "torch_dtype": "bfloat16"}
    weights = random_weights(config)
    write_folder(folder, config, weights)
    write_float8(folder / "model.safetensors", weights | changes)
    return folder


def quantised(dtype=E4M3):
    values = np.random.default_rng(1).uniform(-200, 200, (32, 32)).astype(np.float32)
    return values.astype(dtype)


BLOCKS = {"quant_method": "fp8", "weight_block_size": [20, 12]}


@pytest.mark.parametrize("dtype", [E4M3, np.dtype(ml_dtypes.float8_e5m2)], ids=str)
def test_float8_with_a_scale_for_each_block_is_dequantised(tmp_path, dtype):
    weight = quantised(dtype)
    scale = np.random.default_rng(2).uniform(1e-4, 1e-3, (2, 3)).astype(np.float32)
    changes = {Q_PROJ: weight, f"{Q_PROJ}_scale_inv": scale}
    changes[Q_PROJ.replace("weight", "activation_scale")] = np.ones((), np.float32)
    checkpoint = open_checkpoint(float8_folder(tmp_path / "source", changes, BLOCKS))
    expected = np.empty((32, 32), np.float32)
    for row in range(32):
        for column in range(32):
            factor = scale[row // 20, column // 12]
            expected[row, column] = np.float32(weight[row, column]) * factor
    assert checkpoint.tensors[Q_PROJ].dtype == BFLOAT16
    np.testing.assert_array_equal(checkpoint.read(Q_PROJ), expected.astype(BFLOAT16))
    write_checkpoint(checkpoint, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == random_weights(config_dict()).keys()
    np.testing.assert_array_equal(written[Q_PROJ], expected.astype(BFLOAT16))
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_float8_with_one_scale_is_dequantised(tmp_path, shape):
    changes = {Q_PROJ: quantised(), f"{Q_PROJ}_scale_inv": np.full(shape, 0.01, np.float32)}
    folder = float8_folder(tmp_path / "source", changes, {"quant_method": "fp8"})
    expected = quantised().astype(np.float32) * np.float32(0.01)
    np.testing.assert_array_equal(open_checkpoint(folder).read(Q_PROJ), expected.astype(BFLOAT16))


def test_torch_decodes_float8_alike():
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)
    for ours, theirs in ((E4M3, torch.float8_e4m3fn), (ml_dtypes.float8_e5m2, torch.float8_e5m2)):
        expected = torch.from_numpy(codes).view(theirs).float().numpy()
        np.testing.assert_array_equal(codes.view(ours).astype(np.float32), expected)


def test_float8_without_a_scale_is_refused_by_name(tmp_path):
    folder = float8_folder(tmp_path / "source", {Q_PROJ: quantised()}, BLOCKS)
    with pytest.raises(CheckpointError, match=f"{Q_PROJ} is float8_e4m3fn without .* dequantise"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (6,), (2, 3, 1)])
def test_a_scale_that_does_not_fit_is_refused_by_name(tmp_path, shape):
    changes = {Q_PROJ: quantised(), f"{Q_PROJ}_scale_inv": np.ones(shape, np.float32)}
    with pytest.raises(CheckpointError, match=f"{Q_PROJ}_scale_inv has shape"):
        open_checkpoint(float8_folder(tmp_path / "source", changes, BLOCKS))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", None])
def test_other_quantisations_are_refused_by_name(tmp_path, method):
    config = config_dict() | {"quantization_config": {"quant_method": method}}
    write_folder(tmp_path / "source", config, random_weights(config))
    with pytest.raises(CheckpointError, match=rf"quantised \({method}\).*dequantise"):
        open_checkpoint(tmp_path / "source")


# The hub


@pytest.fixture
def cached_model(tmp_path, monkeypatch):
    """A model in the hub's cache of a machine that is offline."""
    model = tmp_path / "hub" / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("1" * 40)
    (model / "refs" / "v1").write_text("1" * 40)
    (model / "snapshots").mkdir()
    (model / "blobs").mkdir()
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
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in cached_model.iterdir()
    }
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("identifier", ["owner/other", "owner/name@v2", "models/typo"])
def test_what_the_cache_lacks_is_named_offline(cached_model, identifier):
    del cached_model
    with pytest.raises(CheckpointError, match=f"{identifier} is no folder or .gguf file"):
        open_checkpoint(identifier)


def test_a_folder_goes_before_the_hub(cached_model, tmp_path):
    del cached_model
    (tmp_path / "owner").mkdir()
    weights = write_tiny(tmp_path / "owner" / "name", dtype="float16")
    read = open_checkpoint("owner/name").read(Q_PROJ)
    np.testing.assert_array_equal(read, weights[Q_PROJ])


def test_a_cached_model_without_weights_is_refused(cached_model):
    (cached_model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="owner/name has no weights on the hub"):
        open_checkpoint("owner/name")


def test_only_the_preferred_weights_are_downloaded(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(model, *, revision, allow_patterns):
        calls.append((model, revision, allow_patterns[-1]))
        if allow_patterns[-1] == "pytorch_model*.bin":
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    formats = [pickle_file.FILES._replace(stem="model", suffix=".safetensors"), pickle_file.FILES]
    assert hub.download("owner/name@v1", [*formats, flax_file.FILES]) == tmp_path
    assert calls == [
        ("owner/name", "v1", "model*.safetensors"),
        ("owner/name", "v1", "pytorch_model*.bin"),
    ]


def test_extra_files_named_like_weights_do_not_count(tmp_path):
    write_tiny(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    save_file({"x": np.zeros(1)}, tmp_path / "source" / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights: none of model\.safetensors"):
        open_checkpoint(tmp_path / "source")
