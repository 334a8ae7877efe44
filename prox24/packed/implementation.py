"""What an implementation of the product is, and the cases that it is asked for."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.extend
from jax import Array


class Case(NamedTuple):
    """A product x W^T, as far as its speed depends on it.

    Attributes:
      platform: "cpu", "cuda", "tpu", or another that has the fallback alone.
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
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.extend.backend.get_backend().platform_version else "cuda"


class Implementation(NamedTuple):
    """A way to compute the product.

    Attributes:
      run: x (..., in), values (out, in / 2) of the same dtype and codes (out, words) to (..., out)
        of that dtype; traceable. Sums are in float32, or in float64 where x is.
      serves: whether it may run a case. May take long at first, to build what it needs.
    """

    run: Callable[[Array, Array, Array], Array]
    serves: Callable[[Case], bool]
