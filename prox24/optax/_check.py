"""Finds an optimizer that undoes the proximal step."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from prox24._core.compiling import quick_options
from prox24._core.masks import is_sparse
from prox24._core.pattern import PatternLike, as_pattern
from prox24.optax._leaves import (
    Axis,
    Mask,
    PyTree,
    check_array,
    check_values,
    describe,
    map_named,
)
from prox24.optax._transforms import ProximalState, takes_extra_arguments

# So large that the proximal operator keeps the N largest entries of every block.
HARD_PENALTY = 1e30
# An average or a momentum behind `proximal` shows from the second step that it takes.
STEPS_TAKEN = 3
# Enough for an optimizer that accumulates gradients to take its first step.
STEPS_GIVEN = 256
# A penalty may grow for long, and may fall with a learning rate: it is looked at after each count.
COUNTS = tuple(int(1.5**n) for n in range(52))
COUNT = (jax.tree_util.GetAttrKey("count"),)
"""The end of a path to the field of a state."""

NO_STEP = -1.0
"""The penalty before a step."""


# Parameters and gradients are large, so that clipping behind `proximal` shows.
SCALE = 10.0

NOT_LAST = "put proximal last, and give it and check the same pattern, axis and mask"
NOT_REACHED = (
    "it has no proximal for this leaf, or a wrapper does not pass extra arguments on; if the leaf "
    "stays dense on purpose, give check a mask without it"
)


def check(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    pattern: PatternLike = (2, 4),
    *,
    axis: Axis | None = None,
    mask: Mask | None = None,
    penalty: float | None = None,
    steps: int = 1_000_000,
    **extra_args: Any,
) -> None:
    """Raises ValueError if something in an optimizer undoes the zeros that `proximal` makes.

    It takes a few steps, each from other random dense parameters. The extra argument `penalty` is
    so large that `proximal` keeps the N largest entries of every block. A transform behind it that
    scales, decays, clips, averages or adds noise leaves blocks with more nonzeros.

    A penalty that stays small never prunes. So `check` also takes steps without a gradient, with
    the largest penalty of `steps` updates. They start from `params` if its leaves are arrays. In
    `optax.MultiSteps` only some of the updates reach `proximal`. A penalty that falls again may let
    gradients undo zeros. `check` does not find this: give the last update a large `penalty`.

    Parameters, gradients and the optimizer's state are made on the default device. If your model
    does not fit there, give the shapes of a smaller one with the same names.

    Args:
      optimizer: a transform that contains `proximal`.
      params: pytree of arrays, or of `jax.ShapeDtypeStruct`; values matter for the penalty alone.
      pattern: (N, M) or `prox24.Pattern`, as given to `proximal`.
      axis: as given to `proximal`.
      mask: as given to `proximal`.
      penalty: the largest value that you pass to `update` as `penalty`; None if the schedule of
        `proximal` sets it.
      steps: number of updates of your run.
      **extra_args: what else the optimizer's `update` needs, such as value.

    Raises:
      ValueError: a step leaves a leaf that is not N:M, and the message names it. Then `proximal` is
        not last, is missing, or gets no extra arguments. Also if no leaf is pruned or moves, if the
        penalty never prunes, if `steps` is not positive, or if a leaf is traced.

    Example:
      >>> from prox24 import Exponential
      >>> from prox24.optax import proximal
      >>> params, lam = {"kernel": jnp.ones((8, 4))}, Exponential(0.1, 1.05)
      >>> check(optax.chain(optax.sgd(0.1), proximal(lam)), params)
      >>> wrong = optax.chain(optax.sgd(0.1), proximal(lam), optax.scale(0.5))
      >>> check(wrong, params)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      ValueError: kernel is not 2:4 along axis 0 after a step: put proximal last, ...
    """
    pattern = as_pattern(pattern)
    if steps < 1:
        raise ValueError(f"steps {steps} is not a positive number of updates")
    check_values(params, "prox24.optax.check")
    map_named(check_array, params)
    leaves = describe(params, pattern, axis=axis, mask=mask)
    pruned = [i for i, leaf in enumerate(leaves) if leaf.pruned]
    if not pruned:
        raise ValueError("no leaf is pruned: describe(params) says why, mask chooses others")
    if not takes_extra_arguments(optimizer):
        raise ValueError(
            "the optimizer takes no extra arguments: add proximal to it, or pass them on"
        )

    # One program for all, which is compiled quickly: a few steps take less time than that.
    @functools.partial(jax.jit, compiler_options=quick_options())
    def step(
        gradients: PyTree, state: PyTree, params: PyTree, penalty: ArrayLike
    ) -> tuple[PyTree, PyTree, PyTree]:
        updates, state = optimizer.update(gradients, state, params, penalty=penalty, **extra_args)
        return state, updates, optax.apply_updates(params, updates)

    # Outside of the step, since equal leaves then share a program.
    has_pattern = jax.jit(
        is_sparse, static_argnames=("pattern", "axis"), compiler_options=quick_options()
    )

    def dense_leaves(params: PyTree) -> Iterator[int]:
        """The pruned leaves that are not N:M."""
        landed = jax.tree.leaves(params)
        return (i for i in pruned if not has_pattern(landed[i], pattern, leaves[i].axis))

    state = optimizer.init(_random_like(params, seed=0))
    taken = 0
    for seed in range(STEPS_GIVEN):
        before, gradients = _random_like(params, 2 * seed), _random_like(params, 2 * seed + 1)
        next_state, updates, after = step(gradients, state, before, HARD_PENALTY)
        moves = jax.tree.leaves(updates)
        if any(np.any(np.asarray(moves[i]) != 0) for i in pruned):
            first = next(dense_leaves(after), None)
            if first is not None:
                *_, without_penalty = step(gradients, state, before, 0.0)
                landings = (jax.tree.leaves(tree)[first] for tree in (after, without_penalty))
                leaf, reached = leaves[first], not np.array_equal(*landings)
                raise ValueError(
                    f"{leaf.path} is not {pattern} along axis {leaf.axis} after a step: "
                    f"{NOT_LAST if reached else NOT_REACHED}"
                )
            taken += 1
        state = next_state
        if taken == STEPS_TAKEN:
            break
    if not taken:
        raise ValueError(f"the optimizer did not move the pruned leaves in {STEPS_GIVEN} steps")
    still = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
    own = jax.tree.map(_value_like, params, _random_like(params, 1))
    late = penalty
    if late is None:
        count = min((int(node.count) for node in _proximal_states(state)), default=0)
        own_steps = max(1, steps * count // (seed + 1))
        late = _largest_penalty(optimizer, still, state, own, own_steps, extra_args)
    given = min(STEPS_GIVEN, steps)
    for _ in range(given):
        state, _, own = step(still, state, own, late)
        dense = next(dense_leaves(own), None)
        if dense is None:
            return
    assert dense is not None
    of_run = f" in {steps:,} updates" if penalty is None else ""
    raise ValueError(
        f"the penalty, at most {late:.3g}{of_run}, is too small for {leaves[dense].path}: "
        f"{given} steps without a gradient leave it dense; let it grow, as "
        "prox24.Exponential.between(1e-3, 1e6, steps) does"
    )


def _largest_penalty(
    optimizer: optax.GradientTransformation,
    gradients: PyTree,
    state: PyTree,
    params: PyTree,
    steps: int,
    extra_args: dict[str, Any],
) -> float:
    """The largest penalty in a number of steps of `proximal`, the least of several `proximal`.

    It is looked at after the `COUNTS` of steps, and at the last step.
    """

    @functools.partial(jax.jit, compiler_options=quick_options())
    def advance(gradients: PyTree, state: PyTree, params: PyTree) -> PyTree:
        return optimizer.update(gradients, state, params, **extra_args)[1]  # not the operator

    def penalty_at(count: int) -> float:
        def moved(path: tuple[Any, ...], node: Any) -> Any:
            if _is_proximal(node):
                return ProximalState(jnp.int32(count), jnp.full_like(node.penalty, NO_STEP))
            # A wrapper may have a schedule with a count of its own.
            return jnp.full_like(node, count) if path[-1:] == COUNT else node

        late = jax.tree_util.tree_map_with_path(moved, state, is_leaf=_is_proximal)
        for _ in range(STEPS_GIVEN):  # until one that accumulates gradients takes a step
            late = advance(gradients, late, params)
            penalties = (float(node.penalty) for node in _proximal_states(late))
            least = min(penalties, default=0.0)
            if least != NO_STEP:
                return least
        return 0.0

    return max(map(penalty_at, (*(n for n in COUNTS if n < steps), steps - 1)))


def _is_proximal(node: Any) -> bool:
    return isinstance(node, ProximalState)


def _proximal_states(state: PyTree) -> list[ProximalState]:
    return list(filter(_is_proximal, jax.tree.leaves(state, is_leaf=_is_proximal)))


def _value_like(leaf: Any, random: Any) -> Any:
    """The values of a leaf; if it has none, normal ones as large as those of a trained layer."""
    if hasattr(leaf, "__array__"):
        return leaf
    width = max(random.shape, default=1)
    return (random / (SCALE * width**0.5)).astype(random.dtype)


def _random_like(tree: PyTree, seed: int) -> PyTree:
    """Normal numbers in floating leaves, zeros in others."""
    # By numpy: a program for each shape would take longer than all steps.
    rng = np.random.default_rng(seed)

    def random(leaf: Any) -> np.ndarray[Any, Any]:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return (SCALE * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)
        return np.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(random, tree)
