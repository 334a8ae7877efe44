"""Safetensors files, the format that transformers writes."""

import contextlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from prox24._checkpoints.hf_folder import WeightFiles
from prox24._checkpoints.tensors import Put, TensorSource, is_possible, read_entries
from prox24.errors import CheckpointError, DiskError, first_line

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def open_file(path: Path) -> dict[str, TensorSource]:
    """The tensors of a file by name; a dtype outside `DTYPES` becomes void."""
    try:
        with safe_open(path, "numpy"):  # checks that the header fits the file
            pass
        with path.open("rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except OSError as error:
        raise DiskError(f"{path} cannot be read: {error}") from error
    except SafetensorError as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{path} is incomplete or damaged ({reason}): download it again"
        ) from error
    header.pop("__metadata__", None)
    return {name: _source(path, 8 + length, name, entry) for name, entry in header.items()}


def described(path: Path, name: str, entry: Mapping[str, Any]) -> TensorSource:
    """A tensor of a remote file, from its entry in the header; its values cannot be read."""
    return TensorSource(*_source(path, 0, name, entry)[:2])


def _source(path: Path, start: int, name: str, entry: Mapping[str, Any]) -> TensorSource:
    shape = tuple(entry["shape"])
    dtype = DTYPES.get(entry["dtype"], np.dtype(np.void))
    if not is_possible(shape, dtype):
        raise CheckpointError(f"shard {path}: tensor {name} has shape {shape}, as no array has")

    # safe_open has no float8 for numpy.
    def read() -> NDArray[Any]:
        if not dtype.itemsize:
            raise CheckpointError(f"{path}: dtype {entry['dtype']} is not supported")
        first = start + entry["data_offsets"][0]
        return read_entries(path, first, math.prod(shape), dtype).reshape(shape)

    return TensorSource(shape, dtype, read)


@contextlib.contextmanager
def create_file(path: Path, specs: Mapping[str, TensorSource]) -> Iterator[Put]:
    """A file for tensors; their values are written one by one, in any order.

    Values from an earlier run stay in the file. The file is open only while a tensor is written,
    since a model may have too many files to keep open.
    """
    stored = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The largest entries first, so that all are aligned.
    for name, (shape, dtype, _) in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": stored[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    path.touch()
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(start + end)

    def put(name: str, values: NDArray[Any]) -> None:
        with path.open("r+b") as file:
            file.seek(start + header[name]["data_offsets"][0])
            file.write(values.ravel().view(np.uint8).data)

    yield put


FILES = WeightFiles("model", ".safetensors", open_file)
