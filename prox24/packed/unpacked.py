"""The product by XLA: the weight is unpacked, then multiplied. Right everywhere."""

import jax.numpy as jnp
from jax import Array

from prox24.core.precision import PRECISION
from prox24.packed.codes import expand
from prox24.packed.implementation import Case, Implementation


def run(x: Array, values: Array, codes: Array) -> Array:
    """x W^T, see `Implementation`."""
    return multiply(x, expand(values, codes).T)


def multiply(x: Array, y: Array) -> Array:
    """The product of two arrays of one dtype, rounded to it once."""
    sums = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    return jnp.matmul(x, y, precision=PRECISION, preferred_element_type=sums).astype(x.dtype)


def serves(case: Case) -> bool:
    """Whether it may run a case: always."""
    return True


UNPACKED = Implementation(run, serves)
