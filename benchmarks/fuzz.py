"""Hostile files: mutates tiny valid ones, and opens each and reads all of its tensors.

    TMPDIR=/dev/shm python benchmarks/fuzz.py --count 100000
    python benchmarks/fuzz.py --count 100000 --format gguf --seed 1

A file may be read, or refused with a `Prox24Error`. A failure is

- another exception, or a `CheckpointError` that does not name the file;
- the end of the process, by a fault or after more than `SECONDS` of work;
- memory beyond `FACTOR` times the file and an allowance of some MiB;
- a file opened outside the folder, or for writing; a module imported, a process started, anything
  compiled or executed.

Files that fail are kept in the folder `--output`. The same seed makes the same files. They are
written to where temporary files are, which should be memory.
"""

import argparse
import codecs
import contextlib
import functools
import json
import mmap
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import types
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import gguf
import ml_dtypes
import msgpack
import numpy as np
import transformers
from safetensors.numpy import save

from prox24.checkpoints.checkpoint import open_checkpoint, parameter_shapes
from prox24.errors import CheckpointError, Prox24Error

SECONDS = 2
FACTOR = 64
"""To dequantise a tensor of a GGUF takes up to 42 times its bytes."""
ALLOWANCE = 2**22
"""Bytes. A config.json may ask for the names of as many experts as a model has, which are more."""
CONFIG_ALLOWANCE = 3 * 2**23
ADDRESS_SPACE = 2**31
"""What the process may reserve beyond what it has at the start: for libraries that tracemalloc does
not see, and for the modules that they import."""
PROGRESS = struct.Struct("<QQ")

FORBIDDEN = {
    "code.__new__",
    "compile",
    "ctypes.dlopen",
    "exec",
    "import",
    "marshal.loads",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.system",
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


# Tiny models


LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
}
NARROW = SIZES | {"intermediate_size": 8, "num_key_value_heads": 1}
ROPE = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1],
        "long_factor": [1.0, 2.0],
        "original_max_position_embeddings": 8,
    },
}
MIXTURE = {"num_experts": 2, "num_experts_per_tok": 1}
FLOAT8 = {"quant_method": "fp8", "weight_block_size": [2, 2]}
CONFIGS: list[dict[str, Any]] = [
    LLAMA,
    LLAMA | {"quantization_config": FLOAT8, "torch_dtype": "float32"},
    *(
        NARROW | {"model_type": "llama", "rope_scaling": kind, "rope_theta": 100.0}
        for kind in ROPE.values()
    ),
    *(
        NARROW | {"model_type": kind, "sliding_window": 8}
        for kind in ("mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "phi3", "phi")
    ),
    *(
        NARROW | {"model_type": kind, "head_dim": 4, "sliding_window": 8}
        for kind in ("gemma", "gemma2", "gemma3_text")
    ),
    NARROW | {"model_type": "mixtral", "num_local_experts": 2},
    NARROW | {"model_type": "qwen3_moe", "moe_intermediate_size": 4} | MIXTURE,
    NARROW | {"model_type": "olmoe"} | MIXTURE,
    SIZES | {"model_type": "falcon", "alibi": True, "ffn_hidden_size": 8},
    SIZES | {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 1},
    SIZES | {"model_type": "bloom"},
    SIZES | {"model_type": "gpt_neox", "intermediate_size": 8},
    SIZES | {"model_type": "opt", "ffn_dim": 8, "word_embed_proj_dim": 8},
    {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 2, "vocab_size": 8},
]

Weights = dict[str, np.ndarray]


def tiny_weights(config: dict[str, Any]) -> Weights:
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal(shape, np.float32)
        for name, shape in parameter_shapes(config, ()).items()
    }


def some_arrays() -> Weights:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    kinds = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_)
    return {f"{np.dtype(kind).name}.weight": values.astype(kind) for kind in kinds} | {
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2, np.float32),
    }


def float8_arrays() -> Weights:
    weight = np.ones((4, 4), ml_dtypes.float8_e4m3fn)
    return {"a.weight": weight, "a.weight_scale_inv": np.ones((2, 2), np.float32)}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def state_dict(weights: Weights) -> bytes:
    """The pickle of a state dict as torch.save writes it."""

    def tuple_of(*values: bytes) -> bytes:
        return b"(" + b"".join(values) + b"t"

    def numbers(values: tuple[int, ...]) -> bytes:
        return tuple_of(*(b"K" + bytes([value]) for value in values))

    kinds = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}
    ordered = b"ccollections\nOrderedDict\n)R"
    body = b"\x80\x02}q\x00("
    for key, (name, values) in enumerate(weights.items()):
        kind = b"ctorch\n" + kinds[values.dtype.name].encode() + b"Storage\n"
        size = b"J" + struct.pack("<i", values.size)
        stored = tuple_of(text("storage"), kind, text(str(key)), text("cpu"), size) + b"Q"
        strides = tuple(step // values.itemsize for step in values.strides)
        arguments = (stored, b"K\x00", numbers(values.shape), numbers(strides), b"\x89", ordered)
        body += text(name) + b"q\x01" + b"ctorch._utils\n_rebuild_tensor_v2\n"
        body += tuple_of(*arguments) + b"R" + b"r\x00\x01\x00\x00"
    return body + b"u."


def bin_seeds() -> list[bytes]:
    kinds = ("float32", "float16", "bfloat16", "int64")
    weights = {name: values for name, values in some_arrays().items() if name[:-7] in kinds}
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", state_dict(weights))
            archive.writestr("archive/byteorder", b"little")
            for key, values in enumerate(weights.values()):
                archive.writestr(f"archive/data/{key}", values.tobytes())
        file.seek(0)
        zipped = file.read()
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    legacy = b"".join(pickle.dumps(part, 2) for part in parts) + state_dict(weights)
    legacy += pickle.dumps([str(key) for key in range(len(weights))], 2)
    for values in weights.values():
        legacy += struct.pack("<Q", values.size) + values.tobytes()
    return [zipped, legacy]


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
}


def gguf_seed(folder: Path, kind: str, config: dict[str, Any], quantise: bool) -> bytes:
    writer = gguf.GGUFWriter(folder / "seed.gguf", kind)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_context_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<unk>", "<s>", "a", "b", "ab", "c", "\u2581", "</s>"]
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 1, 1, 1, 1, 4, 3])
    writer.add_bos_token_id(1)
    if kind == "llama":
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(index) for index in range(8)])
        writer.add_unk_token_id(0)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges(["a b"])
    for name, values in tiny_weights(config).items():
        module, _, part = name.rpartition(".")
        stored = f"{GGUF_NAMES[module]}.{part}"
        q8 = gguf.GGMLQuantizationType.Q8_0
        if quantise and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(stored, gguf.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(stored, values.astype(np.float16) if values.ndim == 2 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "seed.gguf").read_bytes()


def gguf_seeds() -> list[bytes]:
    wide = LLAMA | {"hidden_size": 32, "num_attention_heads": 2}
    qwen = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": False}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        plain, quantised = (gguf_seed(path, "llama", *case) for case in ((LLAMA, 0), (wide, 1)))
        return [plain, quantised, gguf_seed(path, "qwen2", qwen, False)]


def msgpack_seeds() -> list[bytes]:
    arrays = {
        f"x_{index}": {"kernel": values}
        for index, values in enumerate(some_arrays().values())
        if values.ndim == 2
    }
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 2}}
    chunked["chunks"] = {"0": np.ones(3, np.float32), "1": np.ones(1, np.float32)}
    trees = [{"model": arrays, "bias": np.ones(3, np.float16)}, {"model": {"scale": chunked}}]
    return [flax.serialization.msgpack_serialize(tree) for tree in trees]


# Mutations


NUMBERS = [0, 1, 2, 3, 7, 8, 16, 31, 32, 64, 100, 127, 128, 255, 256, 4096, 65535, 65536]
NUMBERS += [
    2**n + d for n in (9, 10, 20, 24, 28, 30, 31, 32, 40, 48, 60, 62, 63, 64) for d in (-1, 0, 1)
]
DEEP, DIGITS = "@deep", "@digits"
"""Stand for JSON that `json.dumps` does not write."""
VALUES: list[Any] = [
    *NUMBERS,
    *(-number for number in NUMBERS),
    *(None, True, False, 0.5, -0.0, 1e-300, 1e308, 10**30, float("nan"), float("inf")),
    *("", ".", "..", "../", "../elsewhere.safetensors", "/etc/passwd", "link.safetensors"),
    *("a\0b", "\ud800", "\udc80", "\U0001f600", "x" * 300, "x" * 5000, "config.json", "os.system"),
    *("./one.safetensors", "sub/../one.safetensors", "~", "F32", "F64", "F4", "F8_E4M3", "BOOL"),
    *("yarn", "linear", "fp8", "full_attention", "gelu", "float16", "relu", "__class__"),
    *([], {}, [[]], [0], [-1], [1, 1], [0, 2**62], [2**40, 2**40], [2, 2.0], ["x"], {"x": {}}),
    *(DEEP, DIGITS),
]
KEYS = ["__metadata__", "__class__", "__dict__", "attribute_map", "self", "cls", "num_labels"]
KEYS += ["num_hidden_layers", "n_layer", "head_dim", "layer_types", "id2label", "to_dict", "dtype"]
KEYS += ["rope_parameters", "rope_scaling", "partial_rotary_factor", "quantization_config"]
KEYS += ["num_experts", "num_key_value_heads", "per_layer_config", "model_type", "mlp_only_layers"]
TOKENS = [
    b"\xff" * 8,
    b"\0" * 8,
    b"cos\nsystem\n",
    b"\x8c\x02os\x8c\x06system\x93",
    b"(tR",
    b"\x81",
]
TOKENS += [
    b"\x82\x01",
    b"b",
    b"e",
    b"u",
    b"t",
    b"2",
    b"0",
    b"h\x00",
    b"q\x00",
    b"j\0\0\0\0",
    b"\x94",
]
TOKENS += [b"r\xff\xff\xff\x0f", b"\x96" + b"\xff\xff\xff\x7f\0\0\0\0", b"\x8e" + b"\xff" * 8]
TOKENS += [
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc9\0\0\0\x08\x01",
    b"\x9a",
    b"\x85",
]
TOKENS += [
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"PK\x03\x04",
    b"GGUF",
    b'"',
    b"{",
    b"[",
    b"\\ud800",
    b"e999",
]


class Twin(str):
    """A key that a dict may hold beside an equal one."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def mutate_bytes(content: bytes, seeds: list[bytes], chance: random.Random) -> bytes:
    """One to five changes of bytes."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 5))):
        at = chance.randrange(len(data) + 1)
        length = min(chance.choice((1, 1, 2, 4, 8, 30, 300)), len(data) - at)
        match chance.randrange(10):
            case 0 | 1 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 2 if at < len(data):
                data[at] = chance.randrange(256)
            case 3:
                del data[at:]
            case 4:
                data[at:at] = chance.randbytes(length)
            case 5:
                data[at:at] = data[at : at + length] * chance.choice((1, 1, 2, 50))
            case 6:
                del data[at : at + length]
            case 7:
                width = chance.choice((1, 2, 4, 8))
                number = chance.choice(NUMBERS) % 256**width
                data[at : at + width] = number.to_bytes(width, "little")
            case 8:
                token = chance.choice(TOKENS)
                data[at : at + chance.choice((0, len(token)))] = token
            case _:
                other = chance.choice(seeds)
                start = chance.randrange(len(other))
                data[at : at + length] = other[start : start + length]
    return bytes(data)


def mutate_tree(tree: Any, chance: random.Random) -> Any:
    """One to three changes of a tree of dicts and lists, which is changed in place."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = list(places_in(tree))
        if not places:
            return json_copy(chance.choice(VALUES))
        node, key = chance.choice(places)
        match chance.randrange(8):
            case 0 | 1 | 2:
                node[key] = json_copy(chance.choice(VALUES))
            case 3:
                del node[key]
            case 4 if isinstance(node, dict):
                node[Twin(key)] = json_copy(chance.choice([node[key], chance.choice(VALUES)]))
            case 5 if isinstance(node, dict):
                name = chance.choice([*KEYS, *map(str, VALUES)])
                node[name] = json_copy(chance.choice([node[key], chance.choice(VALUES)]))
            case 6:
                other, place = chance.choice(places)
                node[key] = json_copy(other[place])
            case _:
                node[key] = [json_copy(node[key]) for _ in range(chance.choice((1, 2, 70)))]
    return tree


def json_copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: json_copy(entry) for key, entry in value.items()}
    return [json_copy(entry) for entry in value] if isinstance(value, list) else value


def places_in(tree: Any) -> Iterator[tuple[Any, Any]]:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(entries):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from places_in(value)


def json_text(tree: Any, chance: random.Random) -> bytes:
    deep = chance.choice((20, 150, 950, 990, 5000, 100_000))
    written = json.dumps(tree, ensure_ascii=chance.random() < 0.9)
    written = written.replace(f'"{DEEP}"', "[" * deep + "]" * deep)
    return written.replace(f'"{DIGITS}"', "9" * 5000).encode(errors="surrogatepass")


def mutate_json(content: bytes, chance: random.Random) -> bytes:
    return json_text(mutate_tree(json.loads(content), chance), chance)


def mutate_safetensors(content: bytes, chance: random.Random) -> bytes:
    [length] = struct.unpack("<Q", content[:8])
    header = mutate_json(content[8 : 8 + length], chance)
    stated = len(header) + chance.choice((0,) * 20 + (1, -1))
    return struct.pack("<Q", stated) + header + content[8 + length :]


def mutate_msgpack(content: bytes, chance: random.Random) -> bytes:
    """Arrays are lists of shape, dtype and bytes, to be mutated too."""

    def unpack(code: int, data: bytes) -> Any:
        return {"ext": code, "of": msgpack.unpackb(data)}

    def pack(tree: Any) -> Any:
        if isinstance(tree, dict) and tree.keys() == {"ext", "of"} and isinstance(tree["ext"], int):
            return msgpack.ExtType(tree["ext"] % 128, msgpack.packb(pack(tree["of"])))
        if isinstance(tree, dict):
            return {key: pack(value) for key, value in tree.items()}
        return [pack(value) for value in tree] if isinstance(tree, list) else tree

    return msgpack.packb(pack(mutate_tree(msgpack.unpackb(content, ext_hook=unpack), chance)))


# Reading


class Format(NamedTuple):
    """A file that is mutated.

    Attributes:
      file: its name in the folder.
      seeds: valid contents.
      mutate: changes the structure of a seed.
      opened: what is opened, in the folder.
      any_family: as `open_checkpoint` has it.
      beside: other files of the folder.
      allowance: bytes of memory that reading may take beyond a multiple of the file.
    """

    file: str
    seeds: list[bytes]
    mutate: Callable[[bytes, random.Random], bytes] | None = None
    opened: str = "."
    any_family: bool = True
    beside: Mapping[str, bytes] = types.MappingProxyType({})
    allowance: int = ALLOWANCE


def formats() -> dict[str, Format]:
    config = {"config.json": json.dumps({"model_type": "other"}).encode()}
    float8 = json.dumps({"model_type": "other", "quantization_config": FLOAT8}).encode()
    one, two = save({"a": np.ones(2)}), save({"b": np.ones((2, 3), np.float16)})
    shards = {"one.safetensors": one, "two.safetensors": two}
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    return {
        "safetensors": Format(
            "model.safetensors",
            [save(some_arrays()), save(tiny_weights(LLAMA)), save(float8_arrays())],
            mutate_safetensors,
            beside={"config.json": float8},
        ),
        "index": Format(
            "model.safetensors.index.json",
            [json.dumps(index).encode()],
            mutate_json,
            beside=config | shards,
        ),
        "config": Format(
            "config.json",
            [json.dumps(config).encode() for config in CONFIGS],
            mutate_json,
            any_family=False,
            beside={"model.safetensors": save(tiny_weights(LLAMA))},
            allowance=CONFIG_ALLOWANCE,
        ),
        "gguf": Format("model.gguf", gguf_seeds(), opened="model.gguf", any_family=False),
        "msgpack": Format("flax_model.msgpack", msgpack_seeds(), mutate_msgpack, beside=config),
        "bin": Format("pytorch_model.bin", bin_seeds(), beside=config),
    }


def mutated(case: Format, seed: int, number: int) -> bytes:
    """The file of a number; every third of a format with a structure has other bytes too."""
    chance = random.Random(f"{seed} {case.file} {number}")
    content = chance.choice(case.seeds)
    if case.mutate is not None and number % 3:
        with contextlib.suppress(OverflowError, UnicodeEncodeError):  # no msgpack can say that
            content = case.mutate(content, chance)
            if number % 3 == 1:
                return content
    return mutate_bytes(content, case.seeds, chance)


def read(path: Path, any_family: bool, tokenizer: bool) -> bool:
    """Reads all that a model has; False if anything was refused."""
    refused = []
    try:
        checkpoint = open_checkpoint(path, any_family=any_family)
        for name, source in checkpoint.tensors.items():
            try:
                values = checkpoint.read(name)
            except Prox24Error as error:
                refused.append(error)
            else:
                assert (values.shape, values.dtype) == (source.shape, source.dtype), name
        if tokenizer:
            checkpoint.load_tokenizer()
    except Prox24Error as error:
        refused.append(error)
    for error in refused:
        assert not isinstance(error, CheckpointError) or str(path) in str(error), repr(error)
    return not refused


class Watch:
    """Sees what a process opens and executes while it is on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def read(self, case: Format, tokenizer: bool) -> tuple[str, bool, int]:
        """Reads a model; returns the problem, whether all was read, and the memory that it took."""
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # which ends the process
        signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
        self.on, problem, complete = True, "", False
        try:
            complete = read(self.folder / case.opened, case.any_family, tokenizer)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            self.on = False
            frame = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{error!r:.200} at {frame.filename}:{frame.lineno}"
        self.on = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        problem = self.seen[0] if self.seen else problem
        self.seen.clear()
        return problem, complete, tracemalloc.get_traced_memory()[1] - before

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str):
            path = Path(os.path.realpath(arguments[0]))
            if not path.is_relative_to(self.folder) or (arguments[2] or 0) & WRITING:
                self.seen.append(f"open {arguments}")
        elif event in FORBIDDEN:
            self.seen.append(f"{event} {str(arguments)[:200]}")


def run(name: str, seed: int, numbers: range, output: Path, seen: Callable[[int], object]) -> int:
    """Reads files in this process; prints a line for all, and returns how many failed.

    Each number is told to `seen` before it is read.
    """
    case = formats()[name]
    failures: Counter[str] = Counter()
    whole, slowest, largest = 0, 0.0, 0.0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve() / "model"
        folder.mkdir()
        (folder.parent / "elsewhere.safetensors").write_bytes(save({"a": np.ones(2)}))
        (folder / "link.safetensors").symlink_to("../elsewhere.safetensors")
        for file, content in case.beside.items():
            (folder / file).write_bytes(content)
        for content in case.seeds:  # what is imported or made once is there afterwards
            (folder / case.file).write_bytes(content)
            for _ in range(2):
                read(folder / case.opened, case.any_family, name == "gguf")
        for codec in ("cp437", "raw_unicode_escape"):  # of zip files and old pickles
            codecs.lookup(codec)
        watch = Watch(folder)
        tracemalloc.start(1)
        began = time.perf_counter()
        for number in numbers:
            content = mutated(case, seed, number)
            (folder / case.file).write_bytes(content)
            seen(number)
            problem, complete, taken = "", False, 0
            # Twice where it takes much memory: a table of the interpreter grows at times.
            for _ in range(2):
                clock = time.perf_counter()
                problem, complete, taken = watch.read(case, name == "gguf" and not number % 5)
                slowest = max(slowest, time.perf_counter() - clock)
                if taken <= FACTOR * len(content) + case.allowance:
                    break
            else:
                problem = problem or f"{taken} bytes of memory for a file of {len(content)}"
            whole += complete
            largest = max(largest, taken)
            if problem:
                failures[problem] += 1
                if failures[problem] == 1:
                    print(f"{name} {number}: {problem}", flush=True)
                    keep(output, name, number, content)
        seconds = time.perf_counter() - began
        tracemalloc.stop()
    print(
        f"{name}: {len(numbers)} files, {whole} read, {sum(failures.values())} failed, "
        f"{len(numbers) / seconds:.0f} files/s, slowest {slowest:.2f} s, "
        f"most memory {largest / 2**20:.2f} MiB",
        flush=True,
    )
    return sum(failures.values())


def limit_address_space() -> None:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def keep(output: Path, name: str, number: int, content: bytes) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}-{number}").write_bytes(content)


def supervise(arguments: argparse.Namespace) -> int:
    """Reads all files in a process of its own, and after its early end those that remain."""
    names, start, failures = list(arguments.format), arguments.start, 0
    with tempfile.NamedTemporaryFile() as file:
        file.write(PROGRESS.pack(0, 0))
        file.flush()
        while names:
            command = [sys.executable, __file__, "--progress", file.name, "--format", *names]
            command += ["--seed", str(arguments.seed), "--start", str(arguments.start)]
            command += ["--first", str(start), "--count", str(arguments.count)]
            command += ["--output", str(arguments.output)]
            status = subprocess.run(command, check=False).returncode
            if status in (0, 1):
                return failures + status
            place, number = PROGRESS.unpack(Path(file.name).read_bytes())
            names = names[place:]
            print(f"{names[0]} {number}: the process ended with {status}", flush=True)
            content = mutated(formats()[names[0]], arguments.seed, number)
            keep(arguments.output, names[0], number, content)
            failures, start = failures + 1, number + 1
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("safetensors", "index", "config", "gguf", "msgpack", "bin")
    parser.add_argument("--format", nargs="+", choices=names, default=names)
    parser.add_argument("--count", type=int, default=1000, help="files of each format")
    parser.add_argument("--start", type=int, default=0, help="number of the first file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    if arguments.progress is None:
        return min(1, supervise(arguments))
    failures, end = 0, arguments.start + arguments.count
    limit_address_space()
    with open(arguments.progress, "r+b") as file, mmap.mmap(file.fileno(), 16) as progress:
        for place, name in enumerate(arguments.format):
            first = arguments.start if place else arguments.first
            seen = functools.partial(PROGRESS.pack_into, progress, 0, place)
            failures += run(name, arguments.seed, range(first, end), arguments.output, seen)
    return min(1, failures)


if __name__ == "__main__":
    raise SystemExit(main())
