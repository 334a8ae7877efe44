"""Blocks in planar form: plane i holds the i-th entry of every block."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from prox24._core.pattern import PatternLike, as_pattern


def split(w: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> list[Array]:
    """Splits blocks into planes: plane i holds the i-th entry of every block, w[i::M] along `axis`.

    Arithmetic on blocks then is arithmetic on whole contiguous arrays. A block of M units of U
    entries has M U planes, those of a unit one after the other.

    Args:
      w: array whose length along `axis` is a multiple of M U.
      pattern: (N, M), or `prox24.Pattern`.
      axis: the axis along which the blocks run.

    Returns:
      M U arrays of the dtype of `w` and its shape with `axis` divided by M U.

    Raises:
      ValueError: there is no such axis, or its length is not a multiple of M U.

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
    blocks = w.reshape(*w.shape[:axis], length // width, width, *w.shape[axis + 1 :])
    return _unstack(blocks, axis + 1)


def checked_axis(shape: tuple[int, ...], axis: int) -> int:
    """The axis counted from the first; raises ValueError if the shape does not have it."""
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
    """`_unstack` whose transpose is fast too, at the expense of its own speed on CPUs."""

    def by_sums(blocks: Array) -> list[Array]:
        # Sums of one term and zeros: the transpose adds selects, in vectors. That of slices adds
        # padded planes, which XLA's CPU backend computes entry by entry.
        place = lax.broadcasted_iota(jnp.int32, blocks.shape, axis)
        planes = range(blocks.shape[axis])
        return [jnp.sum(jnp.where(place == i, blocks, 0), axis) for i in planes]

    return lax.platform_dependent(
        blocks, cpu=by_sums, default=functools.partial(_unstack, axis=axis)
    )


def join(planes: Sequence[Array], axis: int = -1) -> Array:
    """Undoes `split`: interleaves the M planes along `axis`.

    Args:
      planes: M arrays of one shape and dtype, the entries of each block.
      axis: the axis along which the blocks run.

    Returns:
      Array of that shape, M times longer along `axis`.

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
        # XLA would compute a part of the planes, store it, and compute the rest here, from more.
        cuda=lambda *planes: jnp.stack(lax.optimization_barrier(planes), axis),
        default=lambda *planes: jnp.stack(planes, axis),
    )


@_stack.defjvp
def _stack_jvp(
    axis: int, primals: tuple[tuple[Array, ...]], tangents: tuple[tuple[Array, ...]]
) -> tuple[Array, Array]:
    # The transpose of a plain stack is plain slices, without a branch and masks to remember.
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

    # XLA does not know which branch is taken, always the first, so that it computes the planes
    # before and stores them; it would compute them again for each of the places.
    taken = lax.optimization_barrier(jnp.ones((), bool))
    return lax.cond(taken, interleave, lambda planes: interleave(planes[::-1]), planes)


def units(planes: Sequence[Array], unit: int) -> list[Sequence[Array]]:
    """The planes of each unit of a block."""
    return [planes[start : start + unit] for start in range(0, len(planes), unit)]


def unit_norms(planes: Sequence[Array], unit: int) -> list[Array]:
    """The Euclidean norm of each unit of a block: magnitudes, where a unit is one entry.

    Squares neither overflow nor vanish, and the derivative at zero is zero.
    """
    magnitudes = [jnp.abs(plane) for plane in planes]
    return magnitudes if unit == 1 else [_norm(each) for each in units(magnitudes, unit)]


def _norm(magnitudes: Sequence[Array]) -> Array:
    largest = lax.stop_gradient(functools.reduce(jnp.maximum, magnitudes))
    nonzero = largest != 0  # NaN is nonzero.
    scale = jnp.where(nonzero, largest, 1)
    # Where all is zero the sum is of ones, so that the root has a derivative.
    squares = [jnp.square(jnp.where(nonzero, each / scale, 1)) for each in magnitudes]
    return jnp.where(nonzero, scale * jnp.sqrt(functools.reduce(jnp.add, squares)), 0)


def ranks(planes: Sequence[Array]) -> list[Array]:
    """Rank of each entry within its block, 0 for the largest; ties go to the earlier entry.

    M(M-1)/2 comparisons of whole planes take the place of a sort per block.
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

    A NaN makes its own block NaN and no other.
    """
    v = list(planes)
    for end in range(len(v) - 1, 0, -1):
        for i in range(end):
            v[i], v[i + 1] = jnp.maximum(v[i], v[i + 1]), jnp.minimum(v[i], v[i + 1])
    return v
