"""PyTorch's .bin and .pt files, read without torch and without running what they say.

torch.save writes a pickle, a program for a stack machine that can call any function of Python. The
machine here, `_run`, has the instructions that a state dict needs. It looks no name up: one of
`FUNCTIONS` or `STORAGES` stands for what this module has under it, and every other is refused. The
values of the tensors lie outside the pickle and are read when they are asked for.
"""

import io
import math
import mmap
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from prox24.checkpoints.hf_folder import WeightFiles
from prox24.checkpoints.tensors import MAX_DIMENSIONS, TensorSource, is_possible, read_entries
from prox24.errors import CheckpointError, first_line

STORAGES: dict[str, np.dtype[Any]] = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}

ZIP_START = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_ARGUMENTS = 8
"""Of a function; a long tuple of arguments, passed again and again, would take forever."""


class _Storage(NamedTuple):
    """An array in the file, `length` entries under a key."""

    key: str
    dtype: np.dtype[Any]
    length: int


class _View(NamedTuple):
    """A tensor: entries of a storage, offset and strides counted in entries."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Range(NamedTuple):
    """Bytes of the file."""

    start: int
    size: int


class _Name(NamedTuple):
    """What stands for a function or a class."""

    name: str


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_gradient: Any) -> _View:
    if not isinstance(storage, _Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("a tensor is described by something else than storage, shape and strides")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    if not all(
        type(number) is int and 0 <= number < 2**63 for number in (offset, *shape, *strides)
    ):
        raise ValueError("the offset, shape and strides of a tensor are not all numbers from 0 on")
    return _View(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_gradient: Any) -> _View:
    if not isinstance(data, _View):
        raise ValueError("a parameter holds no tensor")
    return data


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}


def _find(name: str) -> _Name:
    if name not in STORAGES and name not in FUNCTIONS:
        raise ValueError(f"it names {name}, which has no place in a state dict")
    return _Name(name)


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Name) or function.name not in FUNCTIONS:
        raise ValueError("it calls something else than a function")
    if type(arguments) is not tuple or len(arguments) > MAX_ARGUMENTS:
        raise ValueError(f"it calls a function without arguments, or more than {MAX_ARGUMENTS}")
    return FUNCTIONS[function.name](*arguments)


def _storage(pid: Any) -> _Storage:
    if type(pid) is not tuple or len(pid) not in (5, 6):
        raise ValueError("a storage is described by something else than five or six things")
    # The legacy format adds what part of another storage this is, and torch always writes None.
    kind, storage_type, key, _device, length, *part = pid
    if (
        kind != "storage"
        or not isinstance(storage_type, _Name)
        or storage_type.name not in STORAGES
        or type(key) is not str
        or type(length) is not int
        or not 0 <= length < 2**63
        or part not in ([], [None])
    ):
        raise ValueError("a storage is described by something else than type, key and length")
    return _Storage(key, STORAGES[storage_type.name], length)


def _run(file: BinaryIO) -> Any:
    """Runs the pickle that comes next in a file, and returns what it made.

    The file is one in memory, or mapped: such a one reads no more than there is, however much a
    pickle asks for, and allocates no more.

    Raises:
      ValueError: it has an instruction, or a name, that no state dict needs.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def take(count: int) -> list[Any]:
        if count > len(stack) - (marks[-1] if marks else 0):
            raise ValueError("it takes more than there is")
        first = len(stack) - count
        taken = stack[first:]
        del stack[first:]
        return taken

    def take_to_mark() -> list[Any]:
        taken = take(len(stack) - marks[-1])
        marks.pop()
        return taken

    def fill(keys_and_values: list[Any]) -> None:
        # No tuple: one of the same tuple twice, and so on, takes forever to hash or to print.
        if not all(type(key) in (str, int) for key in keys_and_values[::2]):
            raise ValueError("a key of a dict is neither text nor a number")
        stack[-1].update(zip(keys_and_values[::2], keys_and_values[1::2], strict=True))

    argument: Any
    for instruction, argument, _ in pickletools.genops(file):
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(instruction.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(take_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(take(int(instruction.name[-1]))))
            case "APPEND":
                [item] = take(1)
                stack[-1].append(item)
            case "APPENDS":
                items = take_to_mark()
                stack[-1].extend(items)
            case "SETITEM":
                fill(take(2))
            case "SETITEMS":
                fill(take_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_find(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(_find(".".join(take(2))))
            case "REDUCE":
                stack.append(_call(*take(2)))
            case "BINPERSID":
                stack.append(_storage(*take(1)))
            case "BUILD":  # the attributes that torch sets on an OrderedDict
                take(1)
                if not isinstance(stack[-1], dict):
                    raise ValueError("it sets attributes of something else than a dict")
            case "STOP":
                [made] = take(1)
                return made
            case name:
                raise ValueError(f"it has the instruction {name}, which no state dict needs")
    raise ValueError("it has no end")


def open_file(path: Path) -> dict[str, TensorSource]:
    """The tensors of a state dict that torch.save wrote, by name.

    Names of one and the same tensor share one `TensorSource`.

    Raises:
      CheckpointError: the file is damaged, holds something else than a dict of tensors, or names
        a function or class that a state dict does not need.
    """
    try:
        with (
            path.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file,
        ):
            is_zip = file[: len(ZIP_START)] == ZIP_START
            views, ranges = _open_zip(file) if is_zip else _open_legacy(file)
            sources = {view: _source(path, view, ranges, len(file)) for view in views.values()}
    except Exception as error:  # a pickle raises whatever its content runs into
        reason = first_line(error)
        raise CheckpointError(f"{path} cannot be read as a state dict: {reason}") from error
    return {name: sources[view] for name, view in views.items()}


def _open_zip(file: mmap.mmap) -> tuple[dict[str, _View], dict[str, _Range]]:
    """The format since torch 1.6: an archive of a pickle, data.pkl, and a file for each storage."""
    with zipfile.ZipFile(cast(BinaryIO, file)) as archive:
        records = {info.filename: _record(file, info) for info in archive.infolist()}
    [root] = {name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")}
    if _read(file, records.get(f"{root}byteorder", _Range(0, 0))) not in (b"", b"little"):
        raise ValueError("it was written on a big-endian machine")
    state = _run(io.BytesIO(_read(file, records[f"{root}data.pkl"])))
    folder = f"{root}data/"
    return _views(state), {
        name.removeprefix(folder): record
        for name, record in records.items()
        if name.startswith(folder)
    }


def _record(file: mmap.mmap, info: zipfile.ZipInfo) -> _Range:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"the record {info.filename} is compressed")
    start, name, extra = struct.unpack_from("<4s22x2H", file, info.header_offset)
    if start != ZIP_START:
        raise ValueError(f"the record {info.filename} has no header")
    return _Range(info.header_offset + 30 + name + extra, info.file_size)


def _read(file: mmap.mmap, record: _Range) -> bytes:
    return file[record.start : record.start + record.size]


def _open_legacy(file: mmap.mmap) -> tuple[dict[str, _View], dict[str, _Range]]:
    """The format before torch 1.6: five pickles, then each storage behind its length."""
    pickles = cast(BinaryIO, file)
    if _run(pickles) != LEGACY_MAGIC or _run(pickles) != LEGACY_PROTOCOL:
        raise ValueError("it was not written by torch.save")
    if not _run(pickles)["little_endian"]:
        raise ValueError("it was written on a big-endian machine")
    views = _views(_run(pickles))
    widths = {view.storage.key: view.storage.dtype.itemsize for view in views.values()}
    ranges = {}
    for key in _run(pickles):
        if type(key) is not str:
            raise ValueError("the key of a storage is something else than text")
        [length] = struct.unpack("<Q", file.read(8))
        ranges[key] = _Range(file.tell(), length * widths[key])
        file.seek(ranges[key].size, os.SEEK_CUR)
    return views, ranges


def _views(state: Any) -> dict[str, _View]:
    if not isinstance(state, dict):
        raise ValueError("it holds no dict of tensors")
    for name, view in state.items():
        if type(name) is not str or not isinstance(view, _View):
            raise ValueError(f"its entry {name!r} is not a tensor")
    return dict(state)


def _source(path: Path, view: _View, ranges: Mapping[str, _Range], file_size: int) -> TensorSource:
    """Checks that a tensor lies within its storage, and that within the file."""
    storage, entries = view.storage, math.prod(view.shape)
    if storage.key not in ranges:
        raise ValueError(f"the storage {storage.key} is missing")
    record, width = ranges[storage.key], storage.dtype.itemsize
    if storage.length * width > record.size or record.start + record.size > file_size:
        raise ValueError(f"the storage {storage.key} is truncated")
    if not is_possible(view.shape, storage.dtype):
        raise ValueError(f"no array has the shape {view.shape}")
    places = list(zip(view.shape, view.strides, strict=True))
    span = sum((n - 1) * step for n, step in places) + 1 if entries else 0
    # A stride of zero would let a small file describe a tensor larger than the memory.
    if view.offset + span > storage.length or entries > storage.length:
        raise ValueError(f"a tensor of shape {view.shape} reaches beyond its storage")

    def read() -> NDArray[Any]:
        first = record.start + view.offset * width
        values = read_entries(path, first, span, storage.dtype)
        # A stride along one entry or none is of no effect, and may be any number.
        steps = [step * width if n > 1 and entries else 0 for n, step in places]
        return np.asarray(as_strided(values, view.shape, steps), order="C")

    return TensorSource(view.shape, storage.dtype, read)


FILES = WeightFiles("pytorch_model", ".bin", open_file)
