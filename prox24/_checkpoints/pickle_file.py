"""PyTorch's .bin and .pt files, read without torch and without running their code.

torch.save writes a pickle, a program that can call any function of Python. `_Unpickler` has only
the instructions of a state dict, and three functions, all from this module. The values of the
tensors are outside the pickle, and are read on demand.
"""

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from prox24._checkpoints.hf_folder import WeightFiles
from prox24._checkpoints.tensors import MAX_DIMENSIONS, TensorSource, is_possible, read_entries
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


class _Storage(NamedTuple):
    """An array in the file: `length` entries with a key."""

    key: str
    dtype: np.dtype[Any]
    length: int


class _View(NamedTuple):
    """A tensor in a storage; `offset` and `strides` count entries."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


INSTRUCTIONS = (
    # Values and collections.
    (pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE + pickle.BINFLOAT)
    + (pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG1)
    + (pickle.BINUNICODE + pickle.SHORT_BINUNICODE)
    + (pickle.EMPTY_DICT + pickle.EMPTY_LIST + pickle.APPEND + pickle.APPENDS + pickle.MARK)
    + (pickle.EMPTY_TUPLE + pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3)
    # The memo, storages and functions.
    + (pickle.BINPUT + pickle.LONG_BINPUT + pickle.MEMOIZE + pickle.BINGET + pickle.LONG_BINGET)
    + (pickle.BINPERSID + pickle.GLOBAL + pickle.STACK_GLOBAL + pickle.REDUCE)
    + (pickle.PROTO + pickle.FRAME + pickle.STOP)
)
"""A state dict's instructions that pickle executes; this module has SETITEM, SETITEMS and BUILD."""


# The number of arguments is fixed: a long tuple of arguments, used many times, would take too long.
def _rebuild_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _requires_grad: Any,
    _hooks: Any,
    _metadata: Any = None,
) -> _View:
    if not isinstance(storage, _Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("a tensor is described by something else than storage, shape and strides")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    if not all(
        type(number) is int and 0 <= number < 2**63 for number in (offset, *shape, *strides)
    ):
        raise ValueError("the offset, shape and strides of a tensor are not all numbers from 0 on")
    return _View(storage, offset, shape, strides)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, _requires_grad, _hooks: data,
}


def _fill(unpickler: Any, keys_and_values: list[Any]) -> None:
    target, keys, values = unpickler.stack[-1], keys_and_values[::2], keys_and_values[1::2]
    # No tuples as keys: a deep nest of one tuple in itself takes too long to hash or to print.
    if type(target) is not dict or not all(type(key) in (str, int) for key in keys):
        raise ValueError("it fills a dict by a key that is neither text nor a number")
    target.update(zip(keys, values, strict=True))


def _set_item(unpickler: Any) -> None:
    _fill(unpickler, [unpickler.stack.pop(-2), unpickler.stack.pop()])


def _set_items(unpickler: Any) -> None:
    _fill(unpickler, unpickler.pop_mark())


def _build(unpickler: Any) -> None:
    """Drops the attributes that torch sets on an OrderedDict."""
    unpickler.stack.pop()
    if type(unpickler.stack[-1]) is not dict:
        raise ValueError("it sets attributes of something else than a dict")


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> NoReturn:
        name = next((known.name for known in pickletools.opcodes if ord(known.code) == code), code)
        raise ValueError(f"it has the instruction {name}, which no state dict needs")


# The base is not pickle.Unpickler, which is in C. Its instructions cannot be replaced. It also
# allocates the memory that a file claims to need before it checks the size of the file.
class _Unpickler(pickle._Unpickler):
    """Runs the next pickle in a file, which is in memory or mapped.

    Such a file never returns more bytes than it has.
    """

    dispatch = _Instructions(
        {code: pickle._Unpickler.dispatch[code] for code in INSTRUCTIONS}
        | {pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items, pickle.BUILD[0]: _build}
    )

    def find_class(self, module: str, name: str) -> Any:
        """One of `FUNCTIONS`, or the name of a storage."""
        full = f"{module}.{name}"
        if full not in STORAGES and full not in FUNCTIONS:
            raise ValueError(f"it names {full}, which has no place in a state dict")
        return FUNCTIONS.get(full, full)

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage. The legacy format adds None; a view of another storage is not supported."""
        match pid:
            case ("storage", str(kind), str(key), _, int(length), *part):
                if kind in STORAGES and 0 <= length < 2**63 and part in ([], [None]):
                    return _Storage(key, STORAGES[kind], length)
        raise ValueError("a storage is described by something else than type, key and length")


def _load(file: mmap.mmap | io.BytesIO) -> Any:
    return _Unpickler(file).load()  # each pickle has its own memo


def open_file(path: Path) -> dict[str, TensorSource]:
    """The tensors of a state dict from torch.save, by name.

    All names of one tensor share one `TensorSource`.
    """
    try:
        with (
            path.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file,
        ):
            is_zip = file[: len(ZIP_START)] == ZIP_START
            views, ranges = _open_zip(file) if is_zip else _open_legacy(file)
            sources = {view: _source(path, view, ranges, len(file)) for view in views.values()}
    except Exception as error:  # a damaged pickle can raise any exception
        reason = first_line(error)
        raise CheckpointError(f"{path} cannot be read as a state dict: {reason}") from error
    return {name: sources[view] for name, view in views.items()}


def _open_zip(file: mmap.mmap) -> tuple[dict[str, _View], dict[str, slice]]:
    """The format since torch 1.6: an archive with a pickle, data.pkl, and a file per storage."""
    with zipfile.ZipFile(cast(BinaryIO, file)) as archive:
        records = {info.filename: _record(file, info) for info in archive.infolist()}
    [root] = {name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")}
    if file[records.get(f"{root}byteorder", slice(0))] not in (b"", b"little"):
        raise ValueError("it was written on a big-endian machine")
    state = _load(io.BytesIO(file[records[f"{root}data.pkl"]]))
    folder = f"{root}data/"
    return _views(state), {
        name.removeprefix(folder): record
        for name, record in records.items()
        if name.startswith(folder)
    }


def _record(file: mmap.mmap, info: zipfile.ZipInfo) -> slice:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"the record {info.filename} is compressed")
    magic, name, extra = struct.unpack_from("<4s22x2H", file, info.header_offset)
    if magic != ZIP_START:
        raise ValueError(f"the record {info.filename} has no header")
    start = info.header_offset + 30 + name + extra
    return slice(start, start + info.file_size)


def _open_legacy(file: mmap.mmap) -> tuple[dict[str, _View], dict[str, slice]]:
    """The format before torch 1.6: five pickles, then each storage after its length."""
    if _load(file) != LEGACY_MAGIC or _load(file) != LEGACY_PROTOCOL:
        raise ValueError("it was not written by torch.save")
    if not _load(file)["little_endian"]:
        raise ValueError("it was written on a big-endian machine")
    views = _views(_load(file))
    widths = {view.storage.key: view.storage.dtype.itemsize for view in views.values()}
    ranges = {}
    for key in _load(file):
        if type(key) is not str or key not in widths:
            raise ValueError("it stores something else than the storages of its tensors")
        [length] = struct.unpack("<Q", file.read(8))
        ranges[key] = slice(file.tell(), file.tell() + length * widths[key])
        file.seek(ranges[key].stop)
    return views, ranges


def _views(state: Any) -> dict[str, _View]:
    if not isinstance(state, dict):
        raise ValueError("it holds no dict of tensors")
    for name, view in state.items():
        if type(name) is not str or not isinstance(view, _View):
            raise ValueError(f"its entry {name!r} is not a tensor")
    return dict(state)


def _source(path: Path, view: _View, ranges: Mapping[str, slice], file_size: int) -> TensorSource:
    """Checks that a tensor is within its storage, and the storage within the file."""
    storage, entries = view.storage, math.prod(view.shape)
    if storage.key not in ranges:
        raise ValueError(f"the storage {storage.key} is missing")
    record, width = ranges[storage.key], storage.dtype.itemsize
    if storage.length * width > record.stop - record.start or record.stop > file_size:
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
        # Along an axis of one entry or none, the stride has no effect and may be any number.
        steps = [step * width if n > 1 and entries else 0 for n, step in places]
        return np.asarray(as_strided(values, view.shape, steps), order="C")

    return TensorSource(view.shape, storage.dtype, read)


FILES = WeightFiles("pytorch_model", ".bin", open_file)
