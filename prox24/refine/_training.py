"""The training loop of all refinements: masked steps, and the best parameters measured."""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from prox24._core.counts import check_whole
from prox24._core.precision import COMPUTE_DTYPES, working_dtype
from prox24.optax import keep_pattern
from prox24.optax._leaves import check_array, check_values, map_named

PyTree = Any
Loss = Callable[[PyTree, PyTree, PyTree], Array]
"""Function of trained parameters, constants and a batch. It returns a scalar to minimise."""


def check_settings(settings: Any, positive: Sequence[str], shares: Sequence[str]) -> None:
    """Raises ValueError, and names the first field with a wrong value."""
    for field in dataclasses.fields(settings):
        if field.type in (int, "int"):
            check_whole(field.name, getattr(settings, field.name))
    for name in positive:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} {getattr(settings, name)} is not positive")
    for name in shares:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} {getattr(settings, name)} is not from 0 to 1")
    dtype = settings.compute_dtype
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype {dtype} is none of {', '.join(COMPUTE_DTYPES)}")


def at_least_float32(x: Array) -> Array:
    """The array in float32, or in float64 if it is float64: the dtype of losses."""
    return x.astype(working_dtype(x.dtype))


def check_same_shape(name: str, given: Array, target: Array) -> None:
    """Raises ValueError if a target has another shape: a loss would broadcast it."""
    if not hasattr(given, "shape"):
        raise ValueError(f"{name} is a {type(given).__name__}: return one array")
    if given.shape != target.shape:
        raise ValueError(f"{name} has shape {given.shape}, its target {target.shape}")


class Passes:
    """Numbers of steps of both refinements; a group of windows makes one step of a pass."""

    passes: int
    held_out: float

    def held_out_of(self, groups: int) -> int:
        """The number of groups held out; the others are training groups."""
        return max(1, round(self.held_out * groups))

    def steps(self, groups: int) -> int:
        """Number of steps of the optimizer, in all passes over the training groups."""
        return self.passes * (groups - self.held_out_of(groups))


class Outcome(enum.Enum):
    """How a refinement ended."""

    IMPROVED = "improved"
    """The loss on held-out batches is lower than before."""
    UNCHANGED = "unchanged"
    """It never was lower; the parameters are those that were given."""
    DIVERGED = "diverged"
    """A loss or a parameter was no longer finite; the parameters are the best before that."""


class Refined(NamedTuple):
    """Parameters after a refinement, and how it went.

    Attributes:
      params: the best parameters measured, in the given dtypes.
      outcome: an `Outcome`.
      losses: losses on held-out batches, before the first step and at each measurement. A loss is
        NaN if a parameter was no longer finite.
      steps: number of steps of the optimizer.
      resumed_steps: number of the steps that a resumed state had already taken.
    """

    params: PyTree
    outcome: Outcome
    losses: list[float]
    steps: int
    resumed_steps: int = 0


class Training(NamedTuple):
    """The state of a training between two steps, from where it can continue.

    Attributes:
      master: the parameters in float32; float64 parameters in float64.
      optimizer: the state of the optimizer.
      best: the parameters of the lowest loss so far, in the given dtypes.
      losses: as in `Refined`.
      steps: as in `Refined`.
    """

    master: PyTree
    optimizer: PyTree
    best: PyTree
    losses: list[float]
    steps: int

    def diverged(self) -> bool:
        """Whether the last loss is not finite, which ends a training."""
        return not math.isfinite(self.losses[-1])

    def refined(self) -> Refined:
        """The result, if the training ends here."""
        if self.diverged():
            outcome = Outcome.DIVERGED
        elif min(self.losses) < self.losses[0]:
            outcome = Outcome.IMPROVED
        else:
            outcome = Outcome.UNCHANGED
        return Refined(self.best, outcome, self.losses, self.steps)


Resume = Callable[[Training], Training]
OnStep = Callable[[int, float], None]
"""Function of the number of a step and its loss on training batches."""


def refine(
    loss: Loss,
    params: PyTree,
    constants: PyTree,
    batches: Sequence[PyTree],
    optimizer: optax.GradientTransformation,
    *,
    passes: int,
    held_out: int,
    micro_batches: int = 1,
    trainable: PyTree | Callable[[PyTree], PyTree] | None = None,
    measured_every: int | None = None,
    resume: Resume = lambda state: state,
    on_measured: Callable[[Training], None] = lambda state: None,
    on_step: OnStep | None = None,
) -> Refined:
    """Minimises the mean of a loss over batches; `train_model` describes the arguments.

    Programs are compiled once for each function object of the loss and each optimizer object. The
    constants are further, untrained arguments of the loss.
    """
    counts = {"passes": passes, "micro_batches": micro_batches, "measured_every": measured_every}
    check_whole("held_out", held_out)
    for name, count in counts.items():
        if count is None:
            continue
        check_whole(name, count)
        if count < 1:
            raise ValueError(f"{name} {count} is not positive")
    check_values(params, "prox24.refine")
    map_named(_check_floating, params)
    if not 0 < held_out < len(batches):
        raise ValueError(
            f"{len(batches)} batches: {held_out} held out leave none to train or measure"
        )
    training, measured = batches[:-held_out], batches[-held_out:]
    if len(training) % micro_batches:
        raise ValueError(f"{len(training)} batches are no whole number of steps of {micro_batches}")
    steps_of_pass = len(training) // micro_batches
    steps = passes * steps_of_pass
    advance = step_program(loss, optimizer, micro_batches)

    def tell(late: list[tuple[int, list[Array]]]) -> None:
        if on_step is not None:
            for step, parts in late:
                on_step(step, sum(map(float, parts)) / micro_batches)

    def measure(candidate: PyTree) -> float:
        losses = [float(jax.jit(loss)(candidate, constants, batch)) for batch in measured]
        return sum(losses) / held_out

    # Parameters of this dtype are copied too, since steps overwrite the master.
    master = jax.tree.map(
        lambda leaf: jnp.array(leaf, working_dtype(leaf.dtype), copy=True), params
    )
    # Some optimizers store the first parameters. They get copies, since steps overwrite the master.
    memory = keep_pattern(optimizer, trainable).init(jax.tree.map(jnp.copy, master))
    memory = _to_donate(memory, jax.tree.leaves(master)[0].sharding)
    state = resume(Training(master, memory, params, [measure(params)], 0))
    del master, memory  # If another state is resumed, these are not needed.
    resumed_steps = state.steps
    untold: list[tuple[int, list[Array]]] = []
    while state.steps < steps and not state.diverged():
        begin = state.steps % steps_of_pass * micro_batches
        *before, batch = training[begin : begin + micro_batches]
        total = jax.tree.map(jnp.zeros_like, state.master) if before else None
        parts = []
        for other in before:
            total, part = _add_gradient(loss)(total, state.master, constants, other)
            parts.append(part)
        master, memory, part = advance(state.master, state.optimizer, total, constants, batch)
        taken = state.steps + 1
        tell(untold)  # One step late: this waits while the device already has its next step.
        untold = [(taken, [*parts, part])]
        state = state._replace(master=master, optimizer=memory, steps=taken)
        if taken % (measured_every or steps_of_pass) == 0 or taken == steps:
            tell(untold)
            untold = []
            found = jax.tree.map(
                lambda leaf, given: jnp.array(leaf, given.dtype, copy=True), master, params
            )
            finite = _still_finite(params, master) and _still_finite(params, found)
            losses = [*state.losses, measure(found) if finite else math.nan]
            best = found if losses[-1] == min(losses) < losses[0] else state.best
            state = state._replace(best=best, losses=losses)
            on_measured(state)
    return state.refined()._replace(resumed_steps=resumed_steps)


def _check_floating(path: str, leaf: Any) -> None:
    """Raises ValueError for a leaf that has no gradient."""
    check_array(path, leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"{path} is {leaf.dtype}, not floating-point: close over it in the model")


def _to_donate(tree: PyTree, placed: jax.sharding.Sharding) -> PyTree:
    """Copies the arrays: they are donated, and some belong to the optimizer or occur twice.

    Arrays without a chosen device are put on the devices of the parameters. A step leaves its
    results there. Otherwise the second step would be compiled again.
    """

    def own(leaf: Any) -> Any:
        leaf = jnp.copy(leaf)
        if not isinstance(placed, NamedSharding) or getattr(leaf, "committed", False):
            return leaf
        return jax.device_put(leaf, NamedSharding(placed.mesh, PartitionSpec()))

    return jax.tree.map(own, tree)


@jax.jit
def _still_finite(before: PyTree, params: PyTree) -> Array:
    def of(given: Array, leaf: Array) -> Array:
        return jnp.all(jnp.isfinite(leaf) | ~jnp.isfinite(given))

    return jnp.array(jax.tree.leaves(jax.tree.map(of, before, params))).all()


@functools.lru_cache(maxsize=16)
def _add_gradient(loss: Loss) -> Callable[..., tuple[PyTree, Array]]:
    @functools.partial(jax.jit, donate_argnums=0)
    def add(
        total: PyTree, params: PyTree, constants: PyTree, batch: PyTree
    ) -> tuple[PyTree, Array]:
        value, gradient = jax.value_and_grad(loss)(params, constants, batch)
        return jax.tree.map(jnp.add, total, gradient), value

    return add


@functools.lru_cache(maxsize=16)
def step_program(
    loss: Loss, optimizer: optax.GradientTransformation, micro_batches: int
) -> jax.stages.Wrapped:
    """The program of a step on the kept weights, run with the last micro-batch of the step.

    It takes the parameters and the state of `keep_pattern`, and overwrites both. Its other
    arguments are the sum of the gradients of the earlier micro-batches (or None), the constants of
    the loss, and the last micro-batch. It also returns the loss of that micro-batch.
    """
    # The state holds the trainable entries, so the default choice of the transform is not used
    # here.
    transform = keep_pattern(optimizer)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def advance(
        params: PyTree, state: PyTree, total: PyTree | None, constants: PyTree, batch: PyTree
    ) -> tuple[PyTree, PyTree, Array]:
        value, gradient = jax.value_and_grad(loss)(params, constants, batch)
        if total is not None:
            gradient = jax.tree.map(lambda a, b: (a + b) / micro_batches, total, gradient)
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return advance
