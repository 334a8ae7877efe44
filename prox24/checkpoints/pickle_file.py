"""PyTorch's .bin and .pt files, read without torch and without running what they say.

torch.save writes a pickle, and a pickle can call any function of Python. That of a state dict calls
a handful, named in `FUNCTIONS` and `STORAGES`; here each name stands for an object of this module
that a pickle can neither alter nor look into, and every other name is refused. The values of the
tensors lie outside the pickle and are read when they are asked for.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from prox24.checkpoints.hf_folder import WeightFiles
from prox24.checkpoints.tensors import TensorSource, read_entries
from prox24.errors import CheckpointError

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
MAX_DIMENSIONS = 64  # numpy's


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


class _StorageType(NamedTuple):
    """What the name of a storage class stands for."""

    dtype: np.dtype[Any]


class _Function(NamedTuple):
    """What the name of a function stands for."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class _StateDict(dict[Any, Any]):
    """Stands for an OrderedDict, without the attributes that torch sets on it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        del state


def _ordered_dict() -> _StateDict:
    return _StateDict()


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_gradient: Any) -> _View:
    if not isinstance(storage, _Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("a tensor is described by something else than storage, shape and strides")
    if not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
        raise ValueError(f"a tensor has offset {offset}, shape {shape} and strides {strides}")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor has shape {shape} and strides {strides}")
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in STORAGES:
            return _StorageType(STORAGES[full])
        if full in FUNCTIONS:
            return _Function(FUNCTIONS[full])
        raise ValueError(f"it names {full}, which has no place in a state dict")

    def persistent_load(self, pid: Any) -> _Storage:
        # The legacy format adds what part of another storage this is, and torch always writes None.
        kind, storage_type, key, _device, length, *part = pid
        if (
            kind != "storage"
            or not isinstance(storage_type, _StorageType)
            or type(key) is not str
            or type(length) is not int
            or length < 0
            or part not in ([], [None])
        ):
            raise ValueError("a storage is described by something else than type, key and length")
        return _Storage(key, storage_type.dtype, length)


def open_file(path: Path) -> dict[str, TensorSource]:
    """The tensors of a state dict that torch.save wrote, by name.

    Names of one and the same tensor share one `TensorSource`.

    Raises:
      CheckpointError: the file is damaged, holds something else than a dict of tensors, or names
        a function or class that a state dict does not need.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(ZIP_START)) == ZIP_START
            file.seek(0)
            views, ranges = _open_zip(file) if is_zip else _open_legacy(file)
            size = os.fstat(file.fileno()).st_size
            sources = {view: _source(path, view, ranges, size) for view in views.values()}
    except Exception as error:  # a pickle raises whatever its content runs into
        raise CheckpointError(f"{path} cannot be read as a state dict: {error}") from error
    return {name: sources[view] for name, view in views.items()}


def _open_zip(file: BinaryIO) -> tuple[dict[str, _View], dict[str, _Range]]:
    """The format since torch 1.6: an archive of a pickle, data.pkl, and a file for each storage."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: _record(file, info) for info in archive.infolist()}
    [root] = {name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")}
    if _read(file, records.get(f"{root}byteorder", _Range(0, 0))) not in (b"", b"little"):
        raise ValueError("it was written on a big-endian machine")
    state = _Unpickler(io.BytesIO(_read(file, records[f"{root}data.pkl"]))).load()
    folder = f"{root}data/"
    return _views(state), {
        name.removeprefix(folder): record
        for name, record in records.items()
        if name.startswith(folder)
    }


def _record(file: BinaryIO, info: zipfile.ZipInfo) -> _Range:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"the record {info.filename} is compressed")
    file.seek(info.header_offset)
    start, name, extra = struct.unpack("<4s22x2H", file.read(30))
    if start != ZIP_START:
        raise ValueError(f"the record {info.filename} has no header")
    return _Range(info.header_offset + 30 + name + extra, info.file_size)


def _read(file: BinaryIO, record: _Range) -> bytes:
    file.seek(record.start)
    return file.read(record.size)


def _open_legacy(file: BinaryIO) -> tuple[dict[str, _View], dict[str, _Range]]:
    """The format before torch 1.6: five pickles, then each storage behind its length."""
    if _Unpickler(file).load() != LEGACY_MAGIC or _Unpickler(file).load() != LEGACY_PROTOCOL:
        raise ValueError("it was not written by torch.save")
    if not _Unpickler(file).load()["little_endian"]:
        raise ValueError("it was written on a big-endian machine")
    views = _views(_Unpickler(file).load())
    widths = {view.storage.key: view.storage.dtype.itemsize for view in views.values()}
    ranges = {}
    for key in _Unpickler(file).load():
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
    span = sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True)) + 1
    span = span if entries else 0
    # A stride of zero would let a small file describe a tensor larger than the memory.
    if view.offset + span > storage.length or entries > storage.length:
        raise ValueError(f"a tensor of shape {view.shape} reaches beyond its storage")

    def read() -> NDArray[Any]:
        first = record.start + view.offset * width
        values = read_entries(path, first, span, storage.dtype)
        steps = [step * width for step in view.strides]
        return np.asarray(as_strided(values, view.shape, steps), order="C")

    return TensorSource(view.shape, storage.dtype, read)


FILES = WeightFiles("pytorch_model", ".bin", open_file)
