"""N:M patterns: at most N of every M consecutive entries along one axis are nonzero."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

PatternLike = tuple[int, int]


class Pattern(NamedTuple):
    """N:M sparsity: `kept` entries of every `group` consecutive ones may be nonzero."""

    kept: int
    group: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


def as_pattern(pattern: PatternLike) -> Pattern:
    """Checks a pair (N, M) and names its parts.

    Args:
      pattern: two integers with 1 <= N <= M.

    Raises:
      ValueError: the pair is not a pattern.

    Example:
      >>> as_pattern((2, 4)).kept
      2
    """
    kept, group = pattern
    if not 1 <= kept <= group:
        raise ValueError(f"pattern {kept}:{group} is not N:M with 1 <= N <= M")
    return Pattern(kept, group)


def to_planes(w: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> list[Array]:
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
      >>> [plane.tolist() for plane in to_planes(jnp.arange(8), (2, 4))]
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


def from_planes(planes: Sequence[Array], axis: int = -1) -> Array:
    """Undoes `to_planes`: interleaves the M planes along `axis`.

    Args:
      planes: M arrays of one shape, the entries of each block.
      axis: the axis along which the blocks run.

    Returns:
      Array of that shape, M times longer along `axis`.

    Example:
      >>> from_planes(to_planes(jnp.arange(8))).tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    shape = list(planes[0].shape)
    axis = range(len(shape))[axis]
    blocks_shape = (*shape[: axis + 1], len(planes), *shape[axis + 1 :])
    entries = [jnp.broadcast_to(jnp.expand_dims(p, axis + 1), blocks_shape) for p in planes]
    # Selects by position, since XLA's CPU backend runs arithmetic fused into a concatenation along
    # a short axis without vector instructions (forty times slower on the proximal operator).
    position = lax.broadcasted_iota(jnp.int32, blocks_shape, axis + 1)
    blocks = entries[0]
    for i, entry in enumerate(entries[1:], start=1):
        blocks = jnp.where(position == i, entry, blocks)
    shape[axis] *= len(planes)
    return blocks.reshape(shape)


def ranks(planes: Sequence[Array]) -> list[Array]:
    """Rank of each entry within its block, 0 for the largest; ties go to the earlier entry.

    M(M-1)/2 comparisons of whole planes take the place of a sort per block.

    Args:
      planes: M arrays of one shape, the scores in planar form.

    Returns:
      M int32 arrays of that shape.

    Example:
      >>> [int(rank[0]) for rank in ranks(to_planes(jnp.array([1.0, 3.0, 3.0, 2.0])))]
      [3, 0, 1, 2]
    """
    rank = [jnp.zeros(plane.shape, jnp.int32) for plane in planes]
    for i, earlier in enumerate(planes):
        for j in range(i + 1, len(rank)):
            later_wins = (planes[j] > earlier).astype(jnp.int32)
            rank[i] += later_wins
            rank[j] += 1 - later_wins
    return rank


def top_mask(scores: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> Array:
    """Marks the N largest scores of every M consecutive ones; ties go to the earlier entry.

    Args:
      scores: array whose length along `axis` is a multiple of M, for example |w|.
      pattern: (N, M), any 1 <= N <= M.
      axis: the axis along which the blocks run.

    Returns:
      bool array of the shape of `scores`; exactly N True in each block.

    Raises:
      ValueError: the pattern is not N:M, or M does not divide the length along `axis`.

    Example:
      >>> top_mask(jnp.array([1.0, 3.0, 2.0, 0.0])).tolist()
      [False, True, True, False]
    """
    kept = as_pattern(pattern).kept
    return from_planes([rank < kept for rank in ranks(to_planes(scores, pattern, axis))], axis)


def count_violations(w: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> Array:
    """Counts the blocks with more than N nonzeros.

    Args:
      w: array whose length along `axis` is a multiple of M; NaN counts as nonzero.
      pattern: (N, M).
      axis: the axis along which the blocks run.

    Returns:
      int32 scalar.

    Raises:
      ValueError: the pattern is not N:M, or M does not divide the length along `axis`.

    Example:
      >>> int(count_violations(jnp.array([1.0, 2.0, 3.0, 0.0, 1.0, 0.0, 0.0, 2.0])))
      1
    """
    nonzeros = sum((plane != 0).astype(jnp.int32) for plane in to_planes(w, pattern, axis))
    return jnp.count_nonzero(nonzeros > as_pattern(pattern).kept)


def is_sparse(w: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> Array:
    """Whether at most N of every M consecutive entries along `axis` are nonzero.

    Args:
      w: array whose length along `axis` is a multiple of M; NaN counts as nonzero.
      pattern: (N, M).
      axis: the axis along which the blocks run.

    Returns:
      bool scalar.

    Raises:
      ValueError: the pattern is not N:M, or M does not divide the length along `axis`.

    Example:
      >>> bool(is_sparse(jnp.array([0.0, 2.0, 3.0, 0.0])))
      True
    """
    return count_violations(w, pattern, axis) == 0


def mean_sparsity(w: ArrayLike) -> Array:
    """Fraction of the entries that are exactly zero, a float32 scalar.

    Example:
      >>> float(mean_sparsity(jnp.array([0.0, 1.0])))
      0.5
    """
    return jnp.mean(jnp.asarray(w) == 0, dtype=jnp.float32)
