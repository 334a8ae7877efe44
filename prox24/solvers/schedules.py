"""How a penalty, or ADMM's rho, moves from step to step. The numbers are traced."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from prox24.solvers.hyperparameters import hyperparameters


class Progress(NamedTuple):
    """What a schedule may look at when it sets the next value.

    Attributes:
      value: the last one, a scalar.
      steps: taken so far, an int32 scalar.
      changed: entries that entered or left the support, as a fraction of the entries that the
        pattern keeps, a scalar: in the last step of `Prox`, and between the last two moves of rho
        in `ADMM`, infinite before the first.
    """

    value: Array
    steps: Array
    changed: Array


@hyperparameters
class Exponential:
    """first growth^k at move k = 0, 1, ...: the paper's schedule.

    Attributes:
      first: value before the first move.
      growth: factor per move.
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

    def __call__(self, progress: Progress) -> Array:
        """The next value."""
        return progress.value * self.growth


@hyperparameters
class Linear:
    """first + k increment at move k.

    Attributes:
      first: value before the first move.
      increment: added per move.
    """

    first: float
    increment: float

    def __call__(self, progress: Progress) -> Array:
        """The next value."""
        return progress.value + self.increment


@hyperparameters
class Cosine:
    """Half a cosine from `first` to `last` over `steps` steps, and `last` from then on.

    Attributes:
      first: value of the first step.
      last: value from step `steps` on.
      steps: length of the half wave.
    """

    first: float
    last: float
    steps: float

    def __call__(self, progress: Progress) -> Array:
        """The next value."""
        angle = jnp.pi * jnp.minimum(progress.steps.astype(progress.value.dtype) / self.steps, 1)
        return self.first + (self.last - self.first) * (1 - jnp.cos(angle)) / 2


@hyperparameters
class Adaptive:
    """Grows slowly while supports change, and fast while they do not.

    The factor of a step is slowest + (fastest - slowest) / (1 + changed / turnover): committing to
    a support early costs quality, and waiting where nothing changes costs time.

    Attributes:
      first: value of the first step.
      slowest: factor per step when much changes.
      fastest: factor per step when nothing changes.
      turnover: the change, as in `Progress.changed`, at which the factor is halfway.
    """

    first: float
    slowest: float = 1.02
    fastest: float = 1.2
    turnover: float = 0.002

    def __call__(self, progress: Progress) -> Array:
        """The next value."""
        calm = 1 / (1 + progress.changed / self.turnover)
        return progress.value * (self.slowest + (self.fastest - self.slowest) * calm)


@hyperparameters
class SupportSteps:
    """ALPS's rule for rho: times 1.3, 1.2 or 1.1 as over 10%, over 0.5% or anything changed.

    It stays where nothing did, so it is not for `Prox`.

    Attributes:
      first: value of the first step.

    References:
      "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
      arXiv 2406.07831.
    """

    first: float

    def __call__(self, progress: Progress) -> Array:
        """The next value."""
        changed = progress.changed
        some = jnp.where(changed > 0, 1.1, 1.0)
        growth = jnp.where(changed > 0.1, 1.3, jnp.where(changed > 0.005, 1.2, some))
        return progress.value * growth.astype(progress.value.dtype)


Schedule = Exponential | Linear | Cosine | Adaptive | SupportSteps
