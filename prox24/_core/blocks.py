"""Blocks in planar form: plane i holds the i-th entry of every block."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from prox24._core.counts import check_whole
from prox24._core.pattern import PatternLike, as_pattern
from prox24._core.placement import has_whole_blocks
from prox24._core.precision import working_dtype


def split(w: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> list[Array]:
    """Splits blocks into planes: plane i holds entry i of every block, w[i::M U] along `axis`.

    Arithmetic on blocks then becomes arithmetic on whole contiguous arrays. A block has M units of
    U entries, and so M U planes. The planes of a unit follow one another. For a pair (N, M), U is
    1.

    Args:
      w: array whose length along `axis` is a multiple of M U.
      pattern: (N, M), or `prox24.Pattern`.
      axis: the axis along which the blocks run.

    Returns:
      M U arrays of the dtype of `w`, and of its shape with the length of `axis` divided by M U.

    Raises:
      ValueError: the axis does not exist, or M U does not divide its length. It is also
        raised if an explicit axis of a mesh cuts blocks.

    Example:
      >>> [plane.tolist() for plane in split(jnp.arange(8), (2, 4))]
      [[0, 4], [1, 5], [2, 6], [3, 7]]
    """
    w = jnp.asarray(w)
    width = as_pattern(pattern).width
    axis = checked_axis(w.shape, axis)
    length = w.shape[axis]
    if length % width:
        raise ValueError(f"axis {axis} of shape {w.shape} is not divisible by {width}")
    if not has_whole_blocks(w, width, axis):
        raise ValueError(
            f"the mesh cuts blocks of {width} along axis {axis} of shape {w.shape}: "
            "use jax.sharding.reshard first"
        )
    blocks = w.reshape(*w.shape[:axis], length // width, width, *w.shape[axis + 1 :])
    return _unstack(blocks, axis + 1)


def checked_axis(shape: tuple[int, ...], axis: int) -> int:
    """The axis counted from the first; raises ValueError if the shape does not have it."""
    check_whole("axis", axis)
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"an array of shape {shape} has no axis {axis}")
    return axis % len(shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _unstack(blocks: Array, axis: int) -> list[Array]:
    return [lax.index_in_dim(blocks, i, axis, keepdims=False) for i in range(blocks.shape[axis])]


@_unstack.defjvp
def _unstack_jvp(
    axis: int, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[list[Array], list[Array]]:
    return _unstack(*primals, axis), _unstack_linear(*tangents, axis)


@functools.partial(jax.jit, static_argnums=1)
def _unstack_linear(blocks: Array, axis: int) -> list[Array]:
    """`_unstack` with a fast transpose; on CPUs the function itself is slower."""

    def by_sums(blocks: Array) -> list[Array]:
        # Each sum has one nonzero term. The transpose adds selects, which XLA's CPU backend
        # computes in vectors. The transpose of slices adds padded planes, which it computes entry
        # by entry.
        place = lax.broadcasted_iota(jnp.int32, blocks.shape, axis)
        planes = range(blocks.shape[axis])
        return [jnp.sum(jnp.where(place == i, blocks, 0), axis) for i in planes]

    return lax.platform_dependent(
        blocks, cpu=by_sums, default=functools.partial(_unstack, axis=axis)
    )


def join(planes: Sequence[Array], axis: int = -1) -> Array:
    """Undoes `split`: interleaves the planes along `axis`.

    Args:
      planes: all planes of a block, arrays of one shape and dtype.
      axis: the axis along which the blocks run.

    Returns:
      Array of the planes' dtype and shape. It is as many times longer along `axis` as there are
      planes.

    Raises:
      ValueError: the planes have no such axis.

    Example:
      >>> join(split(jnp.arange(8))).tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    axis = checked_axis(planes[0].shape, axis)
    shape = list(planes[0].shape)
    blocks = _stack(tuple(planes), axis + 1)
    shape[axis] *= len(planes)
    return blocks.reshape(shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def _stack(planes: tuple[Array, ...], axis: int) -> Array:
    return lax.platform_dependent(
        *planes,
        cpu=lambda *planes: _stack_by_selects(planes, axis),
        # Without the barrier XLA stores intermediate arrays and finishes the planes here, which
        # reads more memory.
        cuda=lambda *planes: jnp.stack(lax.optimization_barrier(planes), axis),
        default=lambda *planes: jnp.stack(planes, axis),
    )


@_stack.defjvp
def _stack_jvp(
    axis: int, primals: tuple[tuple[Array, ...]], tangents: tuple[tuple[Array, ...]]
) -> tuple[Array, Array]:
    # The transpose of a plain stack is plain slices. It has no branch and keeps no masks.
    return _stack(*primals, axis), jnp.stack(lax.optimization_barrier(*tangents), axis)


def _stack_by_selects(planes: tuple[Array, ...], axis: int) -> Array:
    """`jnp.stack` for XLA's CPU backend, which stacks entry by entry, but selects in vectors."""

    def interleave(planes: tuple[Array, ...]) -> Array:
        shape = (*planes[0].shape[:axis], len(planes), *planes[0].shape[axis:])
        place = lax.broadcasted_iota(jnp.int32, shape, axis)
        first, *others = (lax.expand_dims(plane, [axis]) for plane in planes)
        blocks = jnp.broadcast_to(first, shape)
        for i, plane in enumerate(others, start=1):
            blocks = jnp.where(place == i, plane, blocks)
        return blocks

    # The first branch is always taken, but XLA does not know this. It therefore computes and stores
    # the planes before the branch. Otherwise it would compute them again for each place.
    taken = lax.optimization_barrier(jnp.ones((), bool))
    return lax.cond(taken, interleave, lambda planes: interleave(planes[::-1]), planes)


def units(planes: Sequence[Array], unit: int) -> list[Sequence[Array]]:
    """The planes of each unit of a block."""
    return [planes[start : start + unit] for start in range(0, len(planes), unit)]


def unit_norms(planes: Sequence[Array], unit: int) -> list[Array]:
    """The Euclidean norm of each unit of a block; for units of one entry, the magnitude.

    Squares neither overflow nor vanish, and the derivative at zero is zero.
    """
    magnitudes = [jnp.abs(plane) for plane in planes]
    if unit == 1:
        return magnitudes
    dtype = working_dtype(magnitudes[0].dtype)
    return [_norm([each.astype(dtype) for each in own]) for own in units(magnitudes, unit)]


def _norm(magnitudes: Sequence[Array]) -> Array:
    largest = lax.stop_gradient(functools.reduce(jnp.maximum, magnitudes))
    nonzero = largest != 0  # NaN is nonzero.
    scale = jnp.where(nonzero, largest, 1)
    # In a unit of zeros the sum is of ones, so that the root has a derivative.
    squares = [jnp.square(jnp.where(nonzero, each / scale, 1)) for each in magnitudes]
    norm = jnp.where(nonzero, scale * jnp.sqrt(functools.reduce(jnp.add, squares)), 0)
    return jnp.where(jnp.isinf(largest), largest, norm)


def ranks(planes: Sequence[Array]) -> list[Array]:
    """Rank of each entry within its block, 0 for the largest; ties go to the earlier entry.

    It compares whole planes M(M-1)/2 times, and does not sort each block.
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

    A NaN makes only its own block NaN.
    """
    v = list(planes)
    for end in range(len(v) - 1, 0, -1):
        for i in range(end):
            v[i], v[i + 1] = jnp.maximum(v[i], v[i + 1]), jnp.minimum(v[i], v[i + 1])
    return v
