"""A tensor in a file, known by shape and dtype before it is read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


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
