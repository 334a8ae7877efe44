"""Matrix products whose rounding matters, and the dtypes of computation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from prox24.errors import RecipeError

PRECISION = "highest"
"""Full float32 products. The default of accelerators, one bfloat16 pass or TF32, has errors of
1e-3. That is too much for Grams, for quadratic losses, and for activations that are compared."""

PRODUCTS = {"float32": PRECISION, "tf32x3": lax.DotAlgorithmPreset.TF32_TF32_F32_X3}
"""Precisions of JAX for products of float32 matrices, by their names in a recipe."""

products = jax.make_user_context("float32")
"""`with products(name):` chooses the `PRODUCTS` that a thread traces. JAX's own default precision
would also change products in bfloat16 and float64, and those of a user's function."""

COMPUTE_DTYPES = ("float32", "bfloat16")
"""Dtypes in which products with linears may be computed."""


def matmul(x: Array, y: Array) -> Array:
    """`jnp.matmul` in the chosen products."""
    return jnp.matmul(x, y, precision=_precision(x, y))


def einsum(form: str, *arrays: Array) -> Array:
    """`jnp.einsum` in the chosen products."""
    return jnp.einsum(form, *arrays, precision=_precision(*arrays))


def _precision(*arrays: Array) -> Any:
    float32 = all(array.dtype == jnp.float32 for array in arrays)
    return PRODUCTS[products.value] if float32 else PRECISION


def check_products(name: str) -> None:
    """Raises RecipeError if JAX's first device does not have some `PRODUCTS`."""
    if name == "float32":
        return
    device = jax.devices()[0]
    # NVIDIA GPUs have a number, such as "9.0". AMD GPUs have a name, such as "gfx942".
    capability = str(getattr(device, "compute_capability", ""))
    if not (capability[:1].isdigit() and float(capability) >= 8):
        raise RecipeError(
            f"products {name!r} need an NVIDIA GPU of compute capability 8.0 or more, and this is "
            f"{device.device_kind}: choose 'float32'"
        )


def working_dtype(given: np.dtype[Any]) -> type[jnp.floating]:
    """The dtype of computation: float64 for float64, else float32."""
    return jnp.float64 if given == jnp.float64 else jnp.float32
