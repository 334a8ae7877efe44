"""What an implementation of the product is, and the cases that it is asked for."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array


class Case(NamedTuple):
    """A product x W^T, as far as its speed depends on it.

    Attributes:
      platform: "cpu", "cuda" or "tpu".
      dtype: name of that of x and W.
      outputs, inputs: shape of W.
      batch: vectors in x.
    """

    platform: str
    dtype: str
    outputs: int
    inputs: int
    batch: int


def default_platform() -> str:
    """What a `Case` calls the platform that JAX runs programs on unless told otherwise."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


class Implementation(NamedTuple):
    """A way to compute the product.

    Attributes:
      run: x (..., in), values (out, in / 2) of the same dtype and codes (out, words) to (..., out)
        of that dtype; traceable. Sums are in float32, or in float64 where x is.
      serves: whether it may run a case. May take long at first, to build what it needs.
    """

    run: Callable[[Array, Array, Array], Array]
    serves: Callable[[Case], bool]
