"""The product by XLA, on any device: unpacks the weight, then multiplies."""

import jax.numpy as jnp
from jax import Array

from prox24._core.precision import PRECISION, working_dtype
from prox24.packed._codes import expand


def run(x: Array, values: Array, codes: Array) -> Array:
    """x W^T, with sums in float32, or in float64 if x is float64."""
    return multiply(x, expand(values, codes))


def multiply(x: Array, dense: Array) -> Array:
    """x W^T with a dense W (out, in), with sums in the same dtypes as `run`."""
    sums = working_dtype(x.dtype)
    # It computes W x^T. With one vector, XLA's CPU backend takes ten times as long for x W^T.
    found = jnp.tensordot(
        dense, x, ((1,), (x.ndim - 1,)), precision=PRECISION, preferred_element_type=sums
    )
    return jnp.moveaxis(found.astype(x.dtype), 0, -1)
