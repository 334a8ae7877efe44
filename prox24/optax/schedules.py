"""How the penalty grows over the steps."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def exponential(lam0: ArrayLike, growth: ArrayLike) -> Callable[[ArrayLike], Array]:
    """Schedule of a penalty that grows by a factor: lam0 * growth**count, in float32.

    It levels off where growth**count or the product would exceed the largest float32, instead of
    becoming infinite, so that the product with a learning rate of zero stays zero.

    Args:
      lam0: nonnegative scalar, the penalty at count 0, of the unit of `proximal`'s lam.
      growth: positive scalar, above 1 for a penalty that ends in N:M weights.

    Returns:
      A function from the count, an integer scalar, to a float32 scalar.

    Example:
      >>> schedule = exponential(0.5, 2.0)
      >>> [float(schedule(count)) for count in range(3)]
      [0.5, 1.0, 2.0]
    """

    def schedule(count: ArrayLike) -> Array:
        steps = jnp.asarray(count, jnp.float32)
        # Both are bounded: lam0 may be zero, and a power that is infinite would make it NaN.
        power = jnp.minimum(jnp.asarray(growth, jnp.float32) ** steps, LARGEST)
        return jnp.minimum(jnp.asarray(lam0, jnp.float32) * power, LARGEST)

    return schedule


LARGEST = jnp.finfo(jnp.float32).max
