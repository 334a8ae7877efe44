"""A tensor in a file, known by shape and dtype before it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prox24.errors import CheckpointError


class TensorSource(NamedTuple):
    """Where a tensor's values come from.

    Attributes:
      shape: of the values.
      dtype: of the values.
      read: loads them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], NDArray[Any]]


def read_entries(path: Path, start: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Reads consecutive entries of a file.

    Args:
      path: of the file.
      start: byte of the first entry.
      count: of the entries.
      dtype: of the entries.

    Raises:
      CheckpointError: the file cannot be read, or ends before.
    """
    try:
        content = np.fromfile(path, np.uint8, count=count * dtype.itemsize, offset=start)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if content.size < count * dtype.itemsize:
        raise CheckpointError(f"{path} became shorter")
    return content.view(dtype)
