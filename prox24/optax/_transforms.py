"""The proximal step as an optax transform, and a wrapper that keeps zeros zero."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from prox24._core import planes
from prox24._core.masks import sparse_axes
from prox24._core.pattern import PatternLike, as_pattern
from prox24._core.tracing import is_traced
from prox24._solvers.hyperparameters import check_number, check_numbers
from prox24._solvers.schedules import LARGEST, Exponential
from prox24.optax._landing import landing_updates
from prox24.optax._leaves import (
    Axis,
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
      penalty: float scalar, the penalty of the last update.
    """

    count: Array  # type: ignore[assignment]  # optax's name, and a method of tuples
    penalty: Array


class KeepPatternState(NamedTuple):
    """State of `keep_pattern`.

    Attributes:
      trainable: bool pytree like the parameters, True for trained entries. Each leaf is an array of
        the parameter's shape, or a scalar for the whole parameter.
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

    The chain before it would step to y = params + updates. With it, `optax.apply_updates` lands on

        prox_{learning_rate lam R}(y) = argmin_w  1/2 |w - y|^2 + learning_rate lam R(w).

    So sgd followed by `proximal` is proximal gradient descent. `proximal` must be the last
    transform, since a later one would move the zeros; `check` finds this.

    Zeros are exact in every dtype, and entries that the operator does not change keep their update.
    Any other entry lands within eps (|params| + |w|) of its value w, since the update itself is
    rounded. Here eps belongs to the dtype of the parameters. The updates get the dtype of params +
    updates. This dtype is their own unless the parameters have more digits: a zero needs the exact
    negative of its parameter.

    Args:
      lam: nonnegative scalar, or a schedule: a function of the number of updates so far. Examples
        are `prox24.Exponential`, and `optax.exponential_decay` with a rate above 1. The product
        learning_rate * lam is the lam of `prox24.prox`. If it is negative, weights become NaN.
      pattern: (1, M) or (2, M), or `prox24.Pattern` with units of several entries.
      axis: the axis along which blocks of M run. It is one axis for all leaves, a function of the
        path, or None to choose by name, see `describe`.
      learning_rate: learning rate of the optimizer, scalar or schedule, which makes lam a penalty
        on the loss. With the default, lam is the penalty of one step.
      mask: bool pytree like the parameters or a prefix, with True for the leaves to prune. It can
        also be a function of the parameters that returns such a tree. None chooses by name, see
        `describe`. Updates of other leaves pass through.

    Returns:
      A transform whose `update` needs params. It takes the extra argument `penalty`, a scalar that
      replaces learning_rate * lam in this step.

    Raises:
      ValueError: the pattern is neither 1:M nor 2:M, or a number is negative. In `update`: params
        is missing, the penalty is no scalar, or `mask` selects a leaf that cannot be pruned.

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
    planes.check_kept(pattern.kept, pattern.group)
    for name, value in {"lam": lam, "learning_rate": learning_rate}.items():
        if isinstance(value, Exponential):
            check_numbers(value)
        check_number(name, value)

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
            # A schedule may grow to infinity while the learning rate falls to zero.
            strength = jnp.minimum(_at(lam, state.count), LARGEST)
            penalty = _at(learning_rate, state.count) * strength
        penalty = jnp.asarray(penalty, float)
        if penalty.ndim:
            raise ValueError(f"the penalty has shape {penalty.shape}: give proximal a scalar")
        trained = jax.tree.map(
            lambda u, p: None if u is None else p, updates, params, is_leaf=_is_none
        )
        leaves = describe(trained, pattern, axis=axis, mask=mask)
        steps, structure = jax.tree.flatten(updates)
        landing = landing_updates(leaves, jax.tree.leaves(trained), steps, penalty, pattern)
        count = optax.safe_increment(state.count)
        return jax.tree.unflatten(structure, landing), ProximalState(count, penalty)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_pattern(
    inner: optax.GradientTransformation, trainable: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer: it trains only the kept entries, and the others do not move.

    Gradients are masked before `inner`, and its updates after it. So pruned weights stay zero under
    momentum, under weight decay, and under optimizers that mix entries, such as Muon.

    Args:
      inner: a whole optimizer.
      trainable: bool pytree like the parameters or a prefix, with True for the entries to train. It
        can also be a function of the parameters that returns such a tree; `init` calls it. None is
        `kept_entries`: the nonzeros of the leaves that `proximal` prunes by default, and all other
        leaves. If you pruned other leaves, give `kept_entries` with their mask, since the mask
        alone would train them whole. The result of `prox24.prune_params` has its own `trainable`.

    Returns:
      A transform whose state holds the trainable entries and the state of `inner`. Extra arguments
      of `update` go to `inner`.

    Raises:
      ValueError: `inner` is no optimizer. In `init`: an entry of `trainable` has neither the shape
        of its leaf nor (), or a leaf is no array of numbers. Also if the trainable entries of a
        leaf are 2:4 and others are nonzero, as in the mask of other parameters. Also if by default
        a 2:4 leaf with more nonzeros than a quarter would be trained whole. Under `jax.jit` the
        last two are not found.

    Example:
      >>> params = {"kernel": jnp.array([[1.0], [0.0], [0.0], [2.0]])}
      >>> optimizer = keep_pattern(optax.adamw(0.1, weight_decay=0.1))
      >>> state = optimizer.init(params)
      >>> updates, _ = optimizer.update({"kernel": jnp.ones((4, 1))}, state, params)
      >>> optax.apply_updates(params, updates)["kernel"].ravel().round(2).tolist()
      [0.8899999856948853, 0.0, 0.0, 1.8799999952316284]
    """
    if not hasattr(inner, "update"):
        raise ValueError(f"inner is {inner!r}: give a whole optimizer, as optax.adam(1e-3)")
    if not takes_extra_arguments(inner):
        inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> KeepPatternState:
        # optax maps states with a placeholder without leaves, which no tree fits.
        chosen = trainable if trainable is not None and jax.tree.leaves(params) else kept_entries
        entries = map_named(_checked_entries, params, spread(chosen, params))
        map_named(_check_zeros if trainable is None else _check_others, params, entries)
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
    """Marks the entries to train: the nonzeros of pruned leaves, and all entries of other leaves.

    To choose other leaves, give `keep_pattern` this function with its arguments, for example
    `functools.partial(kept_entries, mask=by_path(lambda path: "mlp" in path))`. A leaf of zeros,
    such as a new adapter, stays zero unless `mask` leaves it out.

    Args:
      params: pytree of arrays.
      pattern: (N, M), or `prox24.Pattern`.
      axis: as in `describe`.
      mask: as in `describe`.

    Returns:
      Bool pytree like `params`, with params != 0 on pruned leaves and a scalar True for the others.

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
    """Whether the optimizer's update takes extra arguments, as in `optax.MultiSteps`."""
    parameters = inspect.signature(optimizer.update).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _at(value: ArrayLike | Schedule, count: Array) -> Array:
    return jnp.asarray(value(count) if callable(value) else value, float)


def _is_none(node: Any) -> bool:
    return node is None


def _checked_entries(path: str, leaf: Array, entries: ArrayLike) -> Array:
    check_array(path, leaf)
    # Each leaf gets its own copy, since the state may be donated.
    entries = jnp.array(entries, bool)
    if entries.shape not in ((), leaf.shape):
        raise ValueError(
            f"trainable of {path} has shape {entries.shape}, the parameter {leaf.shape}: "
            "give one bool for each entry, or one for the leaf"
        )
    return entries


def _check_zeros(path: str, leaf: Array, entries: Array) -> None:
    """Raises ValueError if a pruned leaf is to be trained whole, since its name misleads."""
    if not entries.ndim and (axes := pruned_axes(leaf)):
        raise ValueError(
            f"{path} is 2:4 along axis {axes[0]}, but its zeros would be trained: give trainable, "
            "as pruned.trainable of prox24.prune_params, or kept_entries with axis or mask"
        )


def _check_others(path: str, leaf: Array, entries: Array) -> None:
    """Raises ValueError if the trainable entries are 2:4, and the others are not zero."""
    if entries.ndim < 2:
        return
    others = jnp.count_nonzero(jnp.where(entries, 0, leaf))
    if not is_traced(others) and others and pruned_axes(entries):
        raise ValueError(
            f"the trainable entries of {path} are 2:4, but {int(others)} others are nonzero and "
            "would stay: give the pruned parameters, or the trainable of these"
        )


def pruned_axes(leaf: Any) -> list[int]:
    """The axes along which a matrix is 2:4, with more than a quarter of nonzeros.

    An identity, a new adapter, a choice of some rows and a frozen leaf have fewer.
    """
    if np.ndim(leaf) < 2:
        return []
    share = jnp.count_nonzero(leaf) / max(1, leaf.size)
    # Under `jax.jit` no number is known, also of an array from outside.
    if is_traced(share) or not 0.25 < share <= 0.5:
        return []
    return sparse_axes(leaf)


def _where(trainable: PyTree, updates: PyTree) -> PyTree:
    return jax.tree.map(
        lambda u, k: None if u is None else jnp.where(k, u, 0), updates, trainable, is_leaf=_is_none
    )
