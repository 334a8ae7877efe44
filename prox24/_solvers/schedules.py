"""How a penalty, or ADMM's rho, grows. The numbers are traced."""

from jax import Array

from prox24._solvers.hyperparameters import hyperparameters


@hyperparameters
class Exponential:
    """first growth^k at move k = 0, 1, ...: the paper's schedule.

    Attributes:
      first: value before the first move.
      growth: factor per move; 1 for a constant.
    """

    first: float
    growth: float

    @classmethod
    def between(cls, first: float, last: float, steps: int) -> "Exponential":
        """Reaches `last` at the last of `steps` values, two or more.

        Example:
          >>> Exponential.between(1.0, 16.0, 5).growth
          2.0
        """
        return cls(first, (last / first) ** (1 / (steps - 1)))

    def __call__(self, value: Array) -> Array:
        """The value that follows."""
        return value * self.growth
