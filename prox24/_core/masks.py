"""Masks of N:M patterns, and checks whether an array has a pattern."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from prox24._core.blocks import checked_axis, join, ranks, split, unit_norms, units
from prox24._core.pattern import AnyPattern, Pattern, PatternLike, Unstructured, as_pattern
from prox24._core.placement import has_whole_blocks, whole


def top_mask(scores: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> Array:
    """Marks the N largest scores of every M consecutive ones; ties go to the earlier entry.

    Units of several entries compete by the Euclidean norms of their scores. With |w| as scores, the
    mask shows what the projection on the pattern keeps.

    Args:
      scores: array without NaN, which has no rank; for example |w|. Its length along `axis` is a
        multiple of M units.
      pattern: (N, M), any 1 <= N <= M, or `prox24.Pattern`.
      axis: the axis along which the blocks run.

    Returns:
      bool array of the shape of `scores`. Each block without NaN has exactly N units True.

    Raises:
      ValueError: the pattern is not N:M, the axis does not exist, or has no whole blocks. Also if
        an explicit axis of a mesh cuts blocks.

    Example:
      >>> top_mask(jnp.array([1.0, 3.0, 2.0, 0.0])).tolist()
      [False, True, True, False]
    """
    return _top_mask(jnp.asarray(scores), as_pattern(pattern), axis)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _top_mask(scores: Array, pattern: Pattern, axis: int) -> Array:
    planes = split(scores, pattern, axis)
    competing = planes if pattern.unit == 1 else unit_norms(planes, pattern.unit)
    kept = [rank < pattern.kept for rank in ranks(competing)]
    return join([mask for mask in kept for _ in range(pattern.unit)], axis)


def count_violations(
    w: ArrayLike, pattern: PatternLike | Unstructured = (2, 4), axis: int = -1
) -> Array:
    """Counts the blocks with more than N nonzero units, or without a pattern the surplus nonzeros.

    Args:
      w: array whose length along `axis` is a multiple of M units; NaN counts as nonzero.
        A subnormal number counts as zero where JAX reads it as zero, which it does on CPUs.
      pattern: (N, M), `prox24.Pattern` or `Unstructured`. `Unstructured` counts over the whole
        array, and allows one more nonzero for each row and each column, since methods round within
        them.
      axis: the axis along which the blocks run.

    Returns:
      int32 scalar.

    Raises:
      ValueError: the pattern is not N:M, the axis does not exist, or has no whole blocks.

    Example:
      >>> int(count_violations(jnp.array([1.0, 2.0, 3.0, 0.0, 1.0, 0.0, 0.0, 2.0])))
      1
    """
    found = pattern if isinstance(pattern, Unstructured) else as_pattern(pattern)
    return _count_violations(jnp.asarray(w), found, axis)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _count_violations(w: Array, pattern: AnyPattern, axis: int) -> Array:
    if isinstance(pattern, Unstructured):
        excess = jnp.count_nonzero(w) - pattern.kept(w.size) - sum(w.shape)
        return jnp.maximum(excess, 0).astype(jnp.int32)
    axis = checked_axis(w.shape, axis)
    own = w if has_whole_blocks(w, pattern.width, axis) else whole(w)
    nonzeros = nonzero_units(split(own, pattern, axis), pattern.unit)
    return jnp.count_nonzero(nonzeros > pattern.kept).astype(jnp.int32)


def nonzero_units(planes: Sequence[Array], unit: int) -> Array:
    """The number of units of each block that hold a nonzero, int32 of the shape of a plane."""
    nonzero = [p.astype(bool) for p in planes]
    held = [functools.reduce(jnp.logical_or, each) for each in units(nonzero, unit)]
    return functools.reduce(jnp.add, [each.astype(jnp.int32) for each in held])


def is_sparse(w: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> Array:
    """Whether at most N of every M consecutive units along `axis` are nonzero.

    Args:
      w: array whose length along `axis` is a multiple of M units; NaN counts as nonzero.
        A subnormal number counts as zero where JAX reads it as zero, which it does on CPUs.
      pattern: (N, M), or `prox24.Pattern`.
      axis: the axis along which the blocks run.

    Returns:
      bool scalar.

    Raises:
      ValueError: the pattern is not N:M, the axis does not exist, or has no whole blocks.

    Example:
      >>> bool(is_sparse(jnp.array([0.0, 2.0, 3.0, 0.0])))
      True
    """
    return count_violations(w, pattern, axis) == 0


def sparse_axes(w: Array, pattern: PatternLike = (2, 4)) -> list[int]:
    """The axes along which an array is N:M."""
    width = as_pattern(pattern).width
    return [
        axis
        for axis, length in enumerate(w.shape)
        if length and length % width == 0 and bool(is_sparse(w, pattern, axis))
    ]


@jax.jit
def mean_sparsity(w: ArrayLike) -> Array:
    """Fraction of exact zeros among the entries, a float32 scalar."""
    return jnp.mean(jnp.asarray(w) == 0, dtype=jnp.float32)


def largest_mask(scores: ArrayLike, kept: int, axis: int | None = None) -> Array:
    """Marks the `kept` largest scores of the whole array, or of each line along `axis`.

    Ties go to the earlier entry. NaN counts as largest.
    """
    scores = jnp.asarray(scores)
    flat = scores.ravel() if axis is None else scores
    order = jnp.argsort(flat, axis=axis or 0, stable=True, descending=True)
    ranks = jnp.argsort(order, axis=axis or 0)
    return (ranks < kept).reshape(scores.shape)
