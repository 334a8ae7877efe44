"""Reports on the zeros of any parameter tree: which leaves have the pattern, along which axis."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prox24._core.masks import count_violations, mean_sparsity, sparse_axes
from prox24._core.pattern import Pattern, PatternLike, as_pattern
from prox24._trees.products import is_array
from prox24.optax import Leaf, describe, kept_entries
from prox24.optax._leaves import Axis, Mask, PyTree, check_has_value, check_values, map_named


class LeafReport(NamedTuple):
    """One leaf; printed, it is one line.

    Attributes:
      leaf: its path, shape and axis, and whether it should be pruned.
      zeros: share of exact zeros, from 0 to 1; 0 for a scalar and for other objects.
      violations: blocks along its axis with more than N nonzeros; 0 for a leaf to leave dense.
      other_axes: other axes along which the leaf has the pattern; empty without violations.
    """

    leaf: Leaf
    zeros: float
    violations: int
    other_axes: tuple[int, ...]

    def __str__(self) -> str:
        note = ""
        if self.violations:
            note = f"  {self.violations} blocks break the pattern"
        if self.other_axes:
            axes = " and ".join(map(str, self.other_axes))
            note += f"; it has the pattern along axis {axes}"
            note += f": give axis={self.other_axes[0]} if the layer sums over it"
        return f"{self.zeros:6.1%} zeros  {self.leaf}{note}"


class TreeReport(NamedTuple):
    """A parameter tree; printed, it is a table.

    Attributes:
      pattern: the pattern that each leaf to prune should have.
      leaves: a `LeafReport` for each leaf, in the order of `jax.tree.leaves`.
    """

    pattern: Pattern
    leaves: tuple[LeafReport, ...]

    @property
    def sparse(self) -> bool:
        """Whether there are leaves to prune, and each has the pattern."""
        chosen = [each for each in self.leaves if each.leaf.pruned]
        return bool(chosen) and not any(each.violations for each in chosen)

    def __str__(self) -> str:
        chosen = [each for each in self.leaves if each.leaf.pruned]
        good = sum(not each.violations for each in chosen)
        last = f"{good} of {len(chosen)} leaves to prune are {self.pattern} along their axes"
        return "\n".join([*map(str, self.leaves), last])


def report(
    params: PyTree,
    pattern: PatternLike = (2, 4),
    *,
    axis: Axis | None = None,
    mask: Mask | None = None,
) -> TreeReport:
    """Reports on every leaf of a parameter tree: its zeros, and whether it is N:M along its axis.

    Hardware multiplies faster only if blocks run along the axis that the layer sums over. Some
    libraries prune along another axis; the report then names that axis.

    Args:
      params: pytree of arrays.
      pattern: (N, M), or `prox24.Pattern`.
      axis: as in `prox24.optax.describe`.
      mask: as in `prox24.optax.describe`.

    Returns:
      A `TreeReport`; its `sparse` says whether all leaves to prune have the pattern.

    Raises:
      ValueError: the pattern is not N:M, `mask` is True for a leaf that cannot be pruned, a leaf is
        traced or a `jax.ShapeDtypeStruct`, or there is no array.

    Example:
      >>> kernel = jnp.ones((8, 4)).at[::2].set(0)
      >>> found = report({"up": {"kernel": kernel}, "down": {"kernel": kernel.T}})
      >>> down, up = found.leaves
      >>> (up.violations, down.violations, down.other_axes, found.sparse)
      (0, 4, (1,), False)
    """
    pattern = as_pattern(pattern)
    check_values(params, "prox24.report")
    map_named(check_has_value, params)
    values = jax.tree.leaves(params)
    leaves = describe(params, pattern, axis=axis, mask=mask)
    looked_at = (_looked_at(*pair, pattern) for pair in zip(leaves, values, strict=True))
    return TreeReport(pattern, tuple(looked_at))


def mask_of(
    params: PyTree,
    pattern: PatternLike = (2, 4),
    *,
    axis: Axis | None = None,
    mask: Mask | None = None,
) -> PyTree:
    """The mask of a pruned parameter tree, in the form that other libraries take.

    Each mask has the shape of its leaf. `prox24.optax.kept_entries` has a scalar for a dense leaf.

    Args:
      params: pytree of arrays.
      pattern: (N, M), or `prox24.Pattern`.
      axis: as in `prox24.optax.describe`.
      mask: as in `prox24.optax.describe`.

    Returns:
      Bool pytree like `params`: the nonzeros of leaves to prune, True for others. Give it to
      `prox24.optax.keep_pattern` as `trainable`, or multiply it with weights.

    Raises:
      ValueError: `mask` is True for a leaf that cannot be pruned, or a leaf is a
        `jax.ShapeDtypeStruct`.

    Example:
      >>> params = {"kernel": jnp.array([[1.0], [0.0], [0.0], [2.0]]), "bias": jnp.zeros(1)}
      >>> jax.tree.map(lambda m: m.ravel().tolist(), mask_of(params))
      {'bias': [True], 'kernel': [True, False, False, True]}
    """
    kept = kept_entries(params, as_pattern(pattern), axis=axis, mask=mask)

    def of_leaf(leaf: Any, own: Array) -> Array:
        # The mask of a dense leaf is placed like the leaf.
        return own if own.ndim or not is_array(leaf) else jnp.ones_like(leaf, bool)

    return jax.tree.map(of_leaf, params, kept)


def _looked_at(leaf: Leaf, value: Array, pattern: Pattern) -> LeafReport:
    has_entries = hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
    if not has_entries or not leaf.shape or 0 in leaf.shape:
        return LeafReport(leaf, 0.0, 0, ())
    zeros = float(mean_sparsity(value))
    broken = int(count_violations(value, pattern, leaf.axis)) if leaf.pruned else 0
    others = tuple(sparse_axes(value, pattern)) if broken else ()
    return LeafReport(leaf, zeros, broken, others)
