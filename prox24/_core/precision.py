"""The precision of every matrix product whose rounding matters, and of what else is computed."""

from typing import Any

import jax.numpy as jnp
import numpy as np

PRECISION = "highest"
"""Full float32 products. Accelerators' default, one bfloat16 pass or TF32, has errors of 1e-3: too
much for Grams, for quadratic losses, and for activations that are compared with others'."""

COMPUTE_DTYPES = ("float32", "bfloat16")
"""In which products with linears may be computed."""


def working_dtype(given: np.dtype[Any]) -> type[jnp.floating]:
    """What is computed in: float64 if that is given, else float32."""
    return jnp.float64 if given == jnp.float64 else jnp.float32
