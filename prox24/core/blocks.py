"""Blocks in planar form: plane i holds the i-th entry of every block."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from prox24.core.pattern import PatternLike, as_pattern


def split(w: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> list[Array]:
    """Splits blocks into planes: plane i holds the i-th entry of every block, w[i::M] along `axis`.

    Arithmetic on blocks then is arithmetic on whole contiguous arrays.

    Args:
      w: array whose length along `axis` is a multiple of M.
      pattern: (N, M).
      axis: the axis along which blocks of M consecutive entries run.

    Returns:
      M arrays of the dtype of `w` and its shape with `axis` divided by M.

    Raises:
      ValueError: the length along `axis` is not a multiple of M.

    Example:
      >>> [plane.tolist() for plane in split(jnp.arange(8), (2, 4))]
      [[0, 4], [1, 5], [2, 6], [3, 7]]
    """
    w = jnp.asarray(w)
    group = as_pattern(pattern).group
    axis = range(w.ndim)[axis]
    length = w.shape[axis]
    if length % group:
        raise ValueError(f"axis {axis} of shape {w.shape} is not divisible by {group}")
    blocks = w.reshape(*w.shape[:axis], length // group, group, *w.shape[axis + 1 :])
    return [lax.index_in_dim(blocks, i, axis + 1, keepdims=False) for i in range(group)]


def join(planes: Sequence[Array], axis: int = -1) -> Array:
    """Undoes `split`: interleaves the M planes along `axis`.

    Args:
      planes: M arrays of one shape and dtype, the entries of each block.
      axis: the axis along which the blocks run.

    Returns:
      Array of that shape, M times longer along `axis`.

    Example:
      >>> join(split(jnp.arange(8))).tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    shape = list(planes[0].shape)
    axis = range(len(shape))[axis]
    blocks = lax.platform_dependent(
        *planes,
        cpu=lambda *planes: _selected(planes, axis + 1),
        default=lambda *planes: jnp.stack(planes, axis + 1),
    )
    shape[axis] *= len(planes)
    return blocks.reshape(shape)


def _selected(planes: Sequence[Array], axis: int) -> Array:
    """`jnp.stack` for XLA's CPU backend, which stacks entry by entry, but selects in vectors."""
    dtype = planes[0].dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        # The divisor is one, which XLA does not know: what a division gives is computed once and
        # stored, not computed again for each of the places. In 16 bits it would lose subnormals.
        wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
        one = jnp.ones((), wide)
        *planes, one = lax.optimization_barrier([*(plane.astype(wide) for plane in planes), one])
        planes = [plane / one for plane in planes]
    spread = [lax.expand_dims(plane, [axis]) for plane in planes]
    shape = (*planes[0].shape[:axis], len(planes), *planes[0].shape[axis:])
    place = lax.broadcasted_iota(jnp.int32, shape, axis)
    blocks = jnp.broadcast_to(spread[-1], shape)
    for i, plane in enumerate(spread[:-1]):
        blocks = jnp.where(place == i, plane, blocks)
    return blocks.astype(dtype)


def ranks(planes: Sequence[Array]) -> list[Array]:
    """Rank of each entry within its block, 0 for the largest; ties go to the earlier entry.

    M(M-1)/2 comparisons of whole planes take the place of a sort per block.

    Args:
      planes: M arrays of one shape, the scores in planar form.

    Returns:
      M int32 arrays of that shape.

    Example:
      >>> [int(rank[0]) for rank in ranks(split(jnp.array([1.0, 3.0, 3.0, 2.0])))]
      [3, 0, 1, 2]
    """
    rank = [jnp.zeros(plane.shape, jnp.int32) for plane in planes]
    for i, earlier in enumerate(planes):
        for j in range(i + 1, len(rank)):
            later_wins = (planes[j] > earlier).astype(jnp.int32)
            rank[i] += later_wins
            rank[j] += 1 - later_wins
    return rank


def descending(planes: Sequence[Array]) -> list[Array]:
    """Sorts each block, largest first, by a network of compare-exchanges of whole planes.

    Args:
      planes: M arrays of one shape.

    Returns:
      M arrays of that shape. A NaN makes its own block NaN and no other.

    Example:
      >>> [int(p[0]) for p in descending(split(jnp.array([1, 3, 3, 2])))]
      [3, 3, 2, 1]
    """
    v = list(planes)
    for end in range(len(v) - 1, 0, -1):
        for i in range(end):
            v[i], v[i + 1] = jnp.maximum(v[i], v[i + 1]), jnp.minimum(v[i], v[i + 1])
    return v
