"""The proximal step as an optax transform, and a wrapper that keeps zeros zero."""

import collections
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from prox24._core.pattern import PatternLike, as_pattern
from prox24._core.planes import check_kept
from prox24._core.prox import prox
from prox24.optax._leaves import (
    Axis,
    Leaf,
    Mask,
    PyTree,
    check_array,
    describe,
    map_named,
    nonzeros,
    spread,
)

Schedule = Callable[[ArrayLike], ArrayLike]


class ProximalState(NamedTuple):
    """State of `proximal`.

    Attributes:
      count: int32 scalar, the number of updates so far.
      penalty: float scalar, that of the last update.
    """

    count: Array  # type: ignore[assignment]  # optax's name, and a method of tuples
    penalty: Array


class KeepPatternState(NamedTuple):
    """State of `keep_pattern`.

    Attributes:
      trainable: bool pytree like the parameters, True where they are trained; an entry is an array
        of the leaf's shape, or a scalar for the whole leaf.
      inner: state of the wrapped optimizer.
    """

    trainable: PyTree
    inner: optax.OptState


def proximal(
    lam: ArrayLike | Schedule,
    pattern: PatternLike = (2, 4),
    *,
    axis: Axis | None = None,
    learning_rate: ArrayLike | Schedule = 1.0,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Ends a chain of transforms with the proximal step, which prunes to N:M as `lam` grows.

    Where the chain would step to y = params + updates, `optax.apply_updates` now lands on

        prox_{learning_rate lam R}(y) = argmin_w  1/2 |w - y|^2 + learning_rate lam R(w),

    so that sgd followed by `proximal` is proximal gradient descent. It must be the last transform:
    whatever follows moves the zeros. `check` finds such a chain.

    The zeros are exact in every dtype, and entries that the operator leaves alone keep their
    update. Any other entry lands within eps (|params| + |w|) of w, with eps that of the parameters,
    since the update itself is rounded. Updates leave in the dtype of params + updates: their own,
    unless it holds fewer digits than that of the parameters, whose negative must be exact.

    Args:
      lam: nonnegative scalar, or a schedule: a function of the number of updates so far, such as
        `prox24.Exponential`, or `optax.exponential_decay` with a rate above 1. The product
        learning_rate * lam is the lam of `prox24.prox`; weights are NaN where it is negative.
      pattern: (1, M) or (2, M), or `prox24.Pattern` with units of several entries.
      axis: the axis along which blocks of M run: one for all leaves, or a function of the path;
        None to choose by name, see `describe`.
      learning_rate: that of the optimizer, scalar or schedule, if lam is to be a penalty on the
        loss; with the default, lam is the penalty of one step.
      mask: bool pytree like the parameters or a prefix of it, True for the leaves to prune, or a
        function of the parameters that returns one; None to choose by name, see `describe`. Others
        pass through.

    Returns:
      A transform whose `update` needs params, and takes the extra argument `penalty`: a scalar that
      replaces learning_rate * lam in this step.

    Raises:
      ValueError: another pattern, or a negative number; in `update`, if params is missing, or
        `mask` selects a leaf that cannot be pruned.

    References:
      "A Proximal Operator for Inducing 2:4-Sparsity", arXiv 2501.18015, for R and its operator.

    Example:
      >>> import prox24
      >>> growing = prox24.Exponential(0.01, 1.5)
      >>> optimizer = optax.chain(optax.adam(1e-3), proximal(growing))
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> state = optimizer.init(params)
      >>> for _ in range(20):
      ...     updates, state = optimizer.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> prox24.report(params).sparse
      True
    """

    pattern = as_pattern(pattern)
    check_kept(pattern.kept, pattern.group)
    for name, value in {"lam": lam, "learning_rate": learning_rate}.items():
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{name} is {value}, not a nonnegative number")

    def init(params: PyTree) -> ProximalState:
        del params
        return ProximalState(jnp.zeros((), jnp.int32), jnp.zeros((), float))

    def update(
        updates: PyTree,
        state: ProximalState,
        params: PyTree | None = None,
        *,
        penalty: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ProximalState]:
        del extra_args
        if params is None:
            raise ValueError("proximal needs the parameters: call update(updates, state, params)")
        if penalty is None:
            penalty = _at(learning_rate, state.count) * _at(lam, state.count)
        penalty = jnp.asarray(penalty, float)
        trained = jax.tree.map(
            lambda u, p: None if u is None else p, updates, params, is_leaf=_is_none
        )
        leaves = describe(trained, pattern, axis=axis, mask=mask)
        steps, structure = jax.tree.flatten(updates)
        landing = _landing(leaves, jax.tree.leaves(trained), steps, penalty, pattern)
        count = optax.safe_increment(state.count)
        return jax.tree.unflatten(structure, landing), ProximalState(count, penalty)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_pattern(
    inner: optax.GradientTransformation, trainable: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it trains the kept entries and leaves the others as they are.

    Gradients are masked before `inner` and its updates after it, so that neither momenta nor weight
    decay nor an optimizer that mixes entries, such as Muon, moves a pruned weight from zero.

    Args:
      inner: a whole optimizer.
      trainable: bool pytree like the parameters or a prefix of it, True for entries to train, or a
        function of the parameters that returns one, called by `init`; None for `kept_entries`, the
        nonzeros of the leaves that `proximal` prunes by default. For those of other leaves it is
        `kept_entries` with their mask, not the mask itself, which would train them whole; what
        `prox24.prune_params` pruned has `trainable` of its own.

    Returns:
      A transform whose state holds the kept entries and that of `inner`; extra arguments of
      `update` go to `inner`.

    Raises:
      ValueError: in `init`, if an entry of `trainable` has neither the shape of its leaf nor ().

    Example:
      >>> params = {"kernel": jnp.array([[1.0], [0.0], [0.0], [2.0]])}
      >>> optimizer = keep_pattern(optax.adamw(0.1, weight_decay=0.1))
      >>> state = optimizer.init(params)
      >>> updates, _ = optimizer.update({"kernel": jnp.ones((4, 1))}, state, params)
      >>> optax.apply_updates(params, updates)["kernel"].ravel().round(2).tolist()
      [0.8899999856948853, 0.0, 0.0, 1.8799999952316284]
    """
    if not takes_extra_arguments(inner):
        inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> KeepPatternState:
        # What optax maps states with is a placeholder without leaves, which no tree fits.
        chosen = trainable if trainable is not None and jax.tree.leaves(params) else kept_entries
        entries = map_named(_checked_entries, params, spread(chosen, params))
        return KeepPatternState(entries, inner.init(params))

    def update(
        updates: PyTree, state: KeepPatternState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, KeepPatternState]:
        steps, memory = inner.update(
            _where(state.trainable, updates), state.inner, params, **extra_args
        )
        return _where(state.trainable, steps), KeepPatternState(state.trainable, memory)

    return optax.GradientTransformationExtraArgs(init, update)


def kept_entries(
    params: PyTree,
    pattern: PatternLike = (2, 4),
    *,
    axis: Axis | None = None,
    mask: Mask | None = None,
) -> PyTree:
    """Marks the entries of pruned parameters to train: the nonzeros of pruned leaves, and all else.

    To choose other leaves, give `keep_pattern` this function with its arguments, for example
    `functools.partial(kept_entries, mask=by_path(lambda path: "mlp" in path))`. A leaf that is
    wholly zero, as adapters begin, stays zero unless `mask` leaves it out.

    Args:
      params: pytree of arrays.
      pattern: (N, M).
      axis: as in `describe`.
      mask: as in `describe`.

    Returns:
      Bool pytree like `params`: params != 0 on pruned leaves, a scalar True for the others.

    Raises:
      ValueError: `mask` is True for a leaf that cannot be pruned.

    Example:
      >>> params = {"kernel": jnp.array([[1.0], [0.0], [0.0], [2.0]]), "bias": jnp.zeros(1)}
      >>> kept = kept_entries(params)
      >>> kept["kernel"].ravel().tolist(), kept["bias"].tolist()
      ([True, False, False, True], True)
    """
    return nonzeros(params, describe(params, pattern, axis=axis, mask=mask))


def takes_extra_arguments(optimizer: optax.GradientTransformation) -> bool:
    """Whether its update does, as those of `optax.MultiSteps` do, of whatever class it is."""
    parameters = inspect.signature(optimizer.update).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _at(value: ArrayLike | Schedule, count: Array) -> Array:
    return jnp.asarray(value(count) if callable(value) else value, float)


def _is_none(node: Any) -> bool:
    return node is None


LOOPED = 2**24
"""Entries of equal leaves in one loop, at most."""


def _landing(
    leaves: Sequence[Leaf],
    params: Sequence[Any],
    updates: Sequence[Any],
    penalty: ArrayLike,
    pattern: PatternLike,
) -> list[Any]:
    """The updates, those of pruned leaves landing where the operator does.

    Equal leaves go through a loop, so that XLA compiles the operator once for them. It would
    compile a copy for each. A loop takes copies of its leaves, so that large leaves have their own.
    """
    alike = collections.defaultdict[Any, list[int]](list)
    for i, leaf in enumerate(leaves):
        if leaf.pruned:
            kinds = map(jax.typeof, (params[i], updates[i]))
            alike[leaf.axis, *((x.shape, x.dtype, x.sharding) for x in kinds)].append(i)
    landing = list(updates)
    for (axis, *_), equal in alike.items():
        together = max(1, LOOPED // max(1, params[equal[0]].size))
        for start in range(0, len(equal), together):
            places = equal[start : start + together]
            own = [[tree[i] for i in places] for tree in (params, updates)]
            found = _landing_updates(*own, penalty, pattern, axis)
            for i, update in zip(places, found, strict=True):
                landing[i] = update
    return landing


@functools.partial(jax.jit, static_argnames=("pattern", "axis"))
def _landing_updates(
    params: list[Array], updates: list[Array], penalty: Array, pattern: PatternLike, axis: int
) -> list[Array]:
    """The updates from equal leaves to the proximal operator of params + update."""

    def land(pair: tuple[Array, Array]) -> Array:
        dtype = jnp.promote_types(pair[0].dtype, pair[1].dtype)
        own, update = (x.astype(dtype) for x in pair)
        target = own + update
        w = prox(target, penalty, pattern, axis)
        # Where nothing changes the update stays, since w - own would round it once more. Where w
        # is zero, w - own is exact.
        return jnp.where(w == target, update, w - own)

    if len(params) == 1:
        return [land((params[0], updates[0]))]
    return list(lax.map(land, (jnp.stack(params), jnp.stack(updates))))


def _checked_entries(path: str, leaf: Array, entries: ArrayLike) -> Array:
    check_array(path, leaf)
    # A copy of its own for each leaf, since the state may be donated.
    entries = jnp.array(entries, bool)
    if entries.shape not in ((), leaf.shape):
        raise ValueError(
            f"trainable of {path} has shape {entries.shape}, the parameter {leaf.shape}: "
            "give one bool for each entry, or one for the leaf"
        )
    return entries


def _where(trainable: PyTree, updates: PyTree) -> PyTree:
    return jax.tree.map(
        lambda u, k: None if u is None else jnp.where(k, u, 0), updates, trainable, is_leaf=_is_none
    )
