"""The precision of matrix products whose rounding matters, and the dtypes of computation."""

from typing import Any

import jax.numpy as jnp
import numpy as np

PRECISION = "highest"
"""Full float32 products. The default of accelerators, one bfloat16 pass or TF32, has errors of
1e-3. That is too much for Grams, for quadratic losses, and for activations that are compared."""

COMPUTE_DTYPES = ("float32", "bfloat16")
"""Dtypes in which products with linears may be computed."""


def working_dtype(given: np.dtype[Any]) -> type[jnp.floating]:
    """The dtype of computation: float64 for float64, else float32."""
    return jnp.float64 if given == jnp.float64 else jnp.float32
