"""Schedules of a penalty, or of ADMM's rho. Their numbers are traced."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from prox24._solvers.hyperparameters import hyperparameters

LARGEST = 1e30
"""Prunes all blocks with entries above 1e-29, and is far below the largest float32."""


@hyperparameters
class Exponential:
    """first growth^k at move k = 0, 1, ...: the paper's schedule, for solvers and for optax.

    Call it like a schedule of optax. `prox24.optax.proximal(Exponential(1e-3, 1.05))` has a penalty
    that grows by 5% a step. `Exponential.between` goes from one value to another in a given number
    of steps.

    Attributes:
      first: value before the first move.
      growth: factor per move; 1 for a constant.
    """

    first: float
    growth: float

    @classmethod
    def between(cls, first: float, last: float, steps: int) -> "Exponential":
        """A schedule of `steps` values, from `first` to `last`.

        Raises:
          ValueError: there are fewer than two steps, or a value is not positive.

        Example:
          >>> Exponential.between(1.0, 16.0, 5).growth
          2.0
        """
        if steps < 2 or not (first > 0 and last > 0):
            raise ValueError(
                f"from {first} to {last} in {steps} steps: two steps or more are needed, and "
                "positive values"
            )
        return cls(first, (last / first) ** (1 / (steps - 1)))

    def __call__(self, count: ArrayLike) -> Array:
        """The value after `count` moves, at most 1e30.

        Example:
          >>> Exponential(1.0, 2.0)(3).item()
          8.0
        """
        moves = jnp.asarray(count, float)
        # Zero times infinity would be NaN.
        grown = jnp.minimum(self.growth**moves, jnp.finfo(moves.dtype).max)
        return jnp.minimum(self.first * grown, LARGEST)

    def after(self, value: Array) -> Array:
        """The value after `value`, as solvers compute it step by step."""
        return value * self.growth
