"""Masks of N:M patterns, and whether an array has one."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from prox24._core.blocks import join, ranks, split
from prox24._core.pattern import PatternLike, Unstructured, as_pattern


def top_mask(scores: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> Array:
    """Marks the N largest scores of every M consecutive ones; ties go to the earlier entry.

    Args:
      scores: array whose length along `axis` is a multiple of M, for example |w|, without
        NaN, which has no rank.
      pattern: (N, M), any 1 <= N <= M.
      axis: the axis along which the blocks run.

    Returns:
      bool array of the shape of `scores`; exactly N True in each block without NaN.

    Raises:
      ValueError: the pattern is not N:M, there is no such axis, or M does not divide its length.

    Example:
      >>> top_mask(jnp.array([1.0, 3.0, 2.0, 0.0])).tolist()
      [False, True, True, False]
    """
    kept = as_pattern(pattern).kept
    return join([rank < kept for rank in ranks(split(scores, pattern, axis))], axis)


def count_violations(
    w: ArrayLike, pattern: PatternLike | Unstructured = (2, 4), axis: int = -1
) -> Array:
    """Counts the blocks with more than N nonzeros, or the nonzeros that are too many.

    Args:
      w: array whose length along `axis` is a multiple of M; NaN counts as nonzero.
      pattern: (N, M), or unstructured: then the array as a whole is looked at, and one entry more
        is allowed for each row and column, since methods round within them.
      axis: the axis along which the blocks run.

    Returns:
      int32 scalar.

    Raises:
      ValueError: the pattern is not N:M, there is no such axis, or M does not divide its length.

    Example:
      >>> int(count_violations(jnp.array([1.0, 2.0, 3.0, 0.0, 1.0, 0.0, 0.0, 2.0])))
      1
    """
    if isinstance(pattern, Unstructured):
        w = jnp.asarray(w)
        excess = jnp.count_nonzero(w) - pattern.kept(w.size) - sum(w.shape)
        return jnp.maximum(excess, 0).astype(jnp.int32)
    nonzeros = sum((plane != 0).astype(jnp.int32) for plane in split(w, pattern, axis))
    return jnp.count_nonzero(nonzeros > as_pattern(pattern).kept).astype(jnp.int32)


def is_sparse(w: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> Array:
    """Whether at most N of every M consecutive entries along `axis` are nonzero.

    Args:
      w: array whose length along `axis` is a multiple of M; NaN counts as nonzero.
      pattern: (N, M).
      axis: the axis along which the blocks run.

    Returns:
      bool scalar.

    Raises:
      ValueError: the pattern is not N:M, there is no such axis, or M does not divide its length.

    Example:
      >>> bool(is_sparse(jnp.array([0.0, 2.0, 3.0, 0.0])))
      True
    """
    return count_violations(w, pattern, axis) == 0


def sparse_axes(w: Array, pattern: PatternLike = (2, 4)) -> list[int]:
    """The axes along which an array is N:M."""
    group = as_pattern(pattern).group
    return [
        axis
        for axis, length in enumerate(w.shape)
        if length and length % group == 0 and bool(is_sparse(w, pattern, axis))
    ]


def mean_sparsity(w: ArrayLike) -> Array:
    """Fraction of the entries that are exactly zero, a float32 scalar."""
    return jnp.mean(jnp.asarray(w) == 0, dtype=jnp.float32)


def largest_mask(scores: ArrayLike, kept: int, axis: int | None = None) -> Array:
    """Marks the `kept` largest scores of the whole array, or of each line along `axis`.

    Ties go to the earlier entry, NaN counts as largest.
    """
    scores = jnp.asarray(scores)
    flat = scores.ravel() if axis is None else scores
    order = jnp.argsort(flat, axis=axis or 0, stable=True, descending=True)
    ranks = jnp.argsort(order, axis=axis or 0)
    return (ranks < kept).reshape(scores.shape)
