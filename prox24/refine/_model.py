"""Settings for training all kept weights of a model together."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import optax

from prox24.errors import Prox24Error
from prox24.refine._training import Passes, check_settings


@dataclasses.dataclass(frozen=True)
class ModelRefinement(Passes):
    """How `prox24.distill` trains: Adam on gradients of norm 1 at most.

    The rate rises linearly over the first n steps, from 1/n of the highest rate. It then falls to
    zero along a cosine.

    Attributes:
      rate: highest rate of Adam.
      passes: number of passes over the training windows.
      step_windows: number of windows of a step.
      held_out: share of the windows held out to choose the best weights. They are the last windows,
        at least as many as one step has. All others are training windows. If windows follow the
        order of a text, shuffle them.
      cross_entropy: share of the cross-entropy of the text's next tokens in the loss, from 0 to 1.
        The rest is the divergence from the dense model's predictions.
      measurements: number of measurements of the held-out loss, evenly over the steps.
      warmup: share of the steps with a rising rate, from 0 to 1.
      micro_batches: number of parts of a step's windows. They are computed one after the other, for
        less memory.
      compute_dtype: dtype of products with linears and the head, "float32" or "bfloat16". The dtype
        bfloat16 is for accelerators, and for CPUs with instructions for it.

    Raises:
      Prox24Error: the micro-batches do not divide the windows of a step.
      ValueError: the rate, the passes, the measurements or the windows of a step are not positive.
        Also if a share is not from 0 to 1, or the dtype is another one.
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
        """Number of windows in memory together."""
        return self.step_windows // self.micro_batches

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate as a function of the number of steps so far, for a number of steps in all."""
        rising = min(round(self.warmup * steps), steps - 1)
        first = self.rate / max(1, rising)
        return optax.warmup_cosine_decay_schedule(first, self.rate, rising, steps)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """The optimizer for a number of steps in all."""
        return optax.chain(optax.stateless(_clipped), optax.adam(self.schedule(steps)))

    def measured_every(self, steps: int) -> int:
        """Steps from one measurement to the next."""
        return max(1, math.ceil(steps / self.measurements))


def _clipped(gradient: Any, _: Any) -> Any:
    """g min(1, 1 / |g|), with the norm over all leaves.

    `optax.clip_by_global_norm` chooses between two trees, and XLA for CPUs stores its choice.
    One factor becomes a part of Adam's kernel instead.
    """
    return optax.tree.scale(jnp.minimum(1, 1 / optax.tree.norm(gradient)), gradient)
