"""How all kept weights of a model are trained together."""

import dataclasses
import math

import optax

from prox24.errors import Prox24Error
from prox24.refine._training import Passes, check_settings


@dataclasses.dataclass(frozen=True)
class ModelRefinement(Passes):
    """How `prox24.distill` trains: Adam on gradients of norm 1 at the most.

    The rate rises along a line, from 1/n of the highest in the first of n steps, and falls to zero
    along a cosine.

    Attributes:
      rate: highest rate of Adam.
      passes: passes over the windows that are not held out.
      step_windows: windows of a step.
      held_out: share of the steps' windows, the last ones, by which the best weights are chosen; at
        least one step's. Shuffle windows that are in the order of a text.
      cross_entropy: share of the loss that is the text's own next tokens, from 0 to 1; the rest is
        the divergence from the dense model's predictions.
      measurements: number of measurements of the held-out loss, evenly over the steps.
      warmup: share of the steps in which the rate rises, from 0 to 1.
      micro_batches: number of parts in which a step's windows are computed, for less memory.
      compute_dtype: dtype in which products with linears and the head are computed, "float32" or
        "bfloat16". bfloat16 is for accelerators and for CPUs with instructions for it.

    Raises:
      Prox24Error: the micro-batches do not divide the windows of a step.
      ValueError: the rate, the passes, the measurements or the windows of a step are not positive,
        a share is not from 0 to 1, or the dtype is another one.
    """

    rate: float = 2e-4
    passes: int = 1
    step_windows: int = 1
    held_out: float = 0.0625
    cross_entropy: float = 0.0
    measurements: int = 4
    warmup: float = 0.1
    micro_batches: int = 1
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        positive = ("rate", "passes", "measurements", "step_windows")
        check_settings(self, positive, ("held_out", "cross_entropy", "warmup"))
        if self.micro_batches < 1 or self.step_windows % self.micro_batches:
            raise Prox24Error(
                f"{self.micro_batches} micro-batches do not divide {self.step_windows} windows of "
                "a step"
            )

    @property
    def micro_batch(self) -> int:
        """Windows that are in memory together."""
        return self.step_windows // self.micro_batches

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate by the number of steps before, of so many in all."""
        rising = min(round(self.warmup * steps), steps - 1)
        first = self.rate / max(1, rising)
        return optax.warmup_cosine_decay_schedule(first, self.rate, rising, steps)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """The optimizer, for so many steps."""
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(self.schedule(steps)))

    def measured_every(self, steps: int) -> int:
        """Steps from one measurement to the next."""
        return max(1, math.ceil(steps / self.measurements))
