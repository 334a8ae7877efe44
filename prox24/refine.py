"""Training what pruning kept: a block of layers to reproduce what the dense block puts out.

The squared error of one linear is not what matters of it. Here all kept weights of a block, its
norms and biases are trained together on the block's output, by any optax optimizer, and the zeros
stay zeros.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from prox24.errors import CalibrationError
from prox24.optax import keep_pattern

PyTree = Any
Apply = Callable[[PyTree, Array], Array]
Loss = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class BlockRefinement:
    """How `prox24.pipeline.prune` refines a layer after its linears are pruned.

    Adam with a rate that falls to zero along a cosine.

    Attributes:
      rate: the first.
      passes: over the calibration windows that are not held out.
      held_out: the share of micro-batches that decides which pass was best; at least one is.
    """

    rate: float = 2e-4
    passes: int = 5
    held_out: float = 0.125

    def micro_batch(self, windows: int, most: int) -> int:
        """Windows of a step: a divisor of `most`, so that there are eight micro-batches or more.

        Raises:
          CalibrationError: there is a single window.
        """
        if windows < 2:
            raise CalibrationError("refining takes two calibration windows or more")
        fits = max(1, windows // 8)
        return max(size for size in range(1, most + 1) if most % size == 0 and size <= fits)

    def held_out_of(self, batches: int) -> int:
        """Micro-batches that are held out."""
        return max(1, round(self.held_out * batches))

    def optimizer(self, batches: int) -> optax.GradientTransformation:
        """The same object for the same number of micro-batches, so that it is compiled once."""
        return _adam(self.rate, self.passes * (batches - self.held_out_of(batches)))


@functools.lru_cache
def _adam(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, max(1, steps)))


class Outcome(enum.Enum):
    """How a refinement ended.

    IMPROVED: the loss on held-out batches is lower than before.
    UNCHANGED: it never was; the parameters are those that were given.
    DIVERGED: a loss was not finite; the parameters are the best before that.
    """

    IMPROVED = "improved"
    UNCHANGED = "unchanged"
    DIVERGED = "diverged"


class Refined(NamedTuple):
    """Parameters after a refinement, and how it went.

    Attributes:
      params: the best of all passes, in the dtypes that were given.
      outcome: an `Outcome`.
      losses: on held-out batches, before the first pass and after each.
      steps: of the optimizer, over all passes.
    """

    params: PyTree
    outcome: Outcome
    losses: list[float]
    steps: int


def relative_error(output: Array, target: Array) -> Array:
    """Mean over tokens of |output - target|^2 / |target|^2, for arrays (..., features).

    The plain squared error is that of a few tokens whose activations are huge.

    Example:
      >>> float(relative_error(jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 1.0]])))
      0.5
    """
    error = jnp.sum(jnp.square(output - target), axis=-1)
    size = jnp.sum(jnp.square(target), axis=-1)
    return jnp.mean(error / jnp.maximum(size, jnp.finfo(size.dtype).tiny))


def block(
    apply: Apply,
    params: PyTree,
    inputs: Sequence[ArrayLike],
    targets: Sequence[ArrayLike],
    optimizer: optax.GradientTransformation,
    *,
    passes: int = 5,
    held_out: int = 1,
    kept: PyTree | Callable[[PyTree], PyTree] | None = None,
    loss: Loss = relative_error,
) -> Refined:
    """Trains the kept parameters of a block so that it reproduces targets.

    Minimises the mean of loss(apply(params, x), t) over batches x, t, one step of the optimizer for
    each, in the given order. The last batches are held out: after each pass the loss is measured on
    them, with the parameters rounded to their dtypes, and the best parameters are returned, which
    are those that were given if no others are better.

    Args:
      apply: the block; compiled once for each function object, so give equal blocks the same.
      params: pytree of floating-point arrays; trained in float32.
      inputs: batches, all of one shape.
      targets: what `apply` should return for each.
      optimizer: compiled once for each object, too. `optax.MultiSteps` accumulates gradients.
      passes: over the batches that are not held out.
      held_out: batches, from the end.
      kept: which entries are trained, see `prox24.optax.keep_pattern`; None for the nonzeros of the
        leaves that `prox24.optax.proximal` prunes, and all other leaves.
      loss: of an output and its target, a scalar.

    Returns:
      A `Refined`.

    Raises:
      ValueError: there are not as many targets as inputs, none is left to train on, or none held
        out; or the shape of an entry of `kept` does not fit.

    Example:
      >>> weight = jnp.array([[1.0, 0.0, 0.0, 2.0]])
      >>> inputs = list(jax.random.normal(jax.random.key(0), (8, 16, 4)))
      >>> targets = [x @ jnp.array([[3.0], [0.0], [0.0], [2.0]]) for x in inputs]
      >>> refined = block(lambda w, x: x @ w["kernel"], {"kernel": weight.T}, inputs, targets,
      ...                 optax.adam(0.3), passes=20)
      >>> refined.outcome, refined.params["kernel"].ravel().round().tolist()
      (<Outcome.IMPROVED: 'improved'>, [3.0, 0.0, 0.0, 2.0])
    """
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} batches of inputs, but {len(targets)} of targets")
    if not 0 < held_out < len(inputs):
        raise ValueError(
            f"{len(inputs)} batches: {held_out} held out leave none to train or measure"
        )
    split = len(inputs) - held_out
    training = _training(apply, loss, optimizer)
    master = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = keep_pattern(optimizer, kept).init(master)

    def rounded(master: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf, given: leaf.astype(given.dtype), master, params)

    def measure(candidate: PyTree) -> float:
        pairs = zip(inputs[split:], targets[split:], strict=True)
        return sum(float(training.measure(candidate, x, t)) for x, t in pairs) / held_out

    best, losses, steps = params, [measure(params)], 0
    for _ in range(passes):
        for x, target in zip(inputs[:split], targets[:split], strict=True):
            master, state = training.advance(master, state, x, target)
            steps += 1
        candidate = rounded(master)
        losses.append(measure(candidate))
        if not jnp.isfinite(losses[-1]):
            return Refined(best, Outcome.DIVERGED, losses, steps)
        if losses[-1] == min(losses) < losses[0]:
            best = candidate
    outcome = Outcome.IMPROVED if min(losses) < losses[0] else Outcome.UNCHANGED
    return Refined(best, outcome, losses, steps)


class _Training(NamedTuple):
    """Compiled functions of one block, loss and optimizer."""

    advance: Callable[..., tuple[PyTree, PyTree]]
    measure: Callable[..., Array]


@functools.lru_cache(maxsize=16)
def _training(apply: Apply, loss: Loss, optimizer: optax.GradientTransformation) -> _Training:
    # The state holds what is kept, so that the transform's own choice is never asked for here.
    transform = keep_pattern(optimizer)

    @jax.jit
    def advance(params: PyTree, state: PyTree, x: Array, target: Array) -> tuple[PyTree, PyTree]:
        gradient = jax.grad(lambda params: loss(apply(params, x), target))(params)
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return _Training(advance, jax.jit(lambda params, x, target: loss(apply(params, x), target)))
