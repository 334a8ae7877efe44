"""Tensors in files, with shape and dtype before the values are read."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prox24.errors import CheckpointError, DiskError

Put = Callable[[str, NDArray[Any]], None]
"""Writes the values of a tensor, by name, to its place in a file."""

MAX_DIMENSIONS = 64  # numpy's

FINITE_CHECK = 2**22
"""The number of entries in one check, so that the copies of a check stay small."""


def _unread() -> NDArray[Any]:
    raise CheckpointError("the weights are not here: the model was opened for names and shapes")


class TensorSource(NamedTuple):
    """A tensor to read or to write; without a `read` function, only shape and dtype are known."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], NDArray[Any]] = _unread


def byte_count(tensor: TensorSource) -> int:
    """The number of bytes of the values."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def is_possible(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether numpy can have an array of a shape; some empty shapes are impossible.

    Example:
      >>> is_possible((0, 2**40), np.dtype(np.int8)), is_possible((0, 2**63), np.dtype(np.int8))
      (True, False)
    """
    width = max(dtype.itemsize, 1)
    if any(n < 0 for n in shape):  # possible in an unchecked header
        return False
    return len(shape) <= MAX_DIMENSIONS and math.prod(n or 1 for n in shape) * width < 2**63


def read_entries(path: Path, start: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Reads `count` consecutive entries of a file from byte `start`."""
    size = count * dtype.itemsize
    try:
        content = np.fromfile(path, np.uint8, count=size, offset=start)
        whole = path.stat().st_size >= start + size
    except OSError as error:
        raise DiskError(f"cannot read {path}: {error.strerror}") from error
    if content.size < size and whole:  # numpy does not say what failed
        raise DiskError(f"cannot read {path}: the disk fails at byte {start + content.size}")
    if content.size < size:
        raise CheckpointError(f"{path} became shorter")
    return content.view(dtype)


@contextlib.contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turns an OSError into a DiskError that names the destination."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot write {destination}: {error.strerror or error}") from error


def is_finite(values: NDArray[Any]) -> bool:
    """Whether no entry is NaN or Inf, in any dtype of numpy or ml_dtypes."""
    entries = values.reshape(-1)
    starts = range(0, entries.size, FINITE_CHECK)
    return all(np.isfinite(entries[i : i + FINITE_CHECK]).all() for i in starts)
