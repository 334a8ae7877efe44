"""Damping a Gram, by more than was asked for where it must be, and inverting it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from prox24._core.placement import replicated
from prox24._core.precision import matmul

DEAD = 1e-6


def damped_gram(gram: Array, damping: Array | float) -> Array:
    """G + damping mean(diag G) I; where that is not positive, 1e-6 of the mean takes its place.

    A Gram of fewer tokens than features is singular; damping makes it positive definite and says
    how far weights may move where the calibration saw nothing. A zero diagonal, or one below it by
    rounding, is left only when the damping is zero: a dead feature, whose weights then cost next to
    nothing. If no token was seen at all, the diagonal becomes 1.
    """
    mean = jnp.mean(jnp.diagonal(gram))
    diagonal = jnp.diagonal(gram) + damping * mean
    dead = jnp.where(mean == 0, 1, DEAD * mean)
    return jnp.fill_diagonal(gram, jnp.where(diagonal <= 0, dead, diagonal), inplace=False)


FIRST_RAISED_DAMPING, LARGEST_DAMPING, RAISE = 1e-6, 1.0, 10.0


class OfDamped(NamedTuple):
    """A matrix that was computed from a damped Gram, and the damping."""

    matrix: Array
    damping: Array


def inverse_factor(gram: Array, damping: Array) -> OfDamped:
    """U upper triangular, with U^T U the inverse of the damped Gram.

    Where the damped Gram is not positive definite to rounding, damping becomes 1e-6 or ten times
    what failed, whichever is more, but at most 1. A Gram for which all fail, such as one that holds
    NaN, keeps what was asked for, and U is NaN.

    Factoring G from its last row to its first gives G = R R^T with R upper triangular. So U = R^-1
    takes one Cholesky factorization and one triangular solve, and no inverse of G.
    """
    factor, used = _with_enough_damping(
        lambda gram: jnp.linalg.cholesky(gram[::-1, ::-1]), gram, damping
    )
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    upper = lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
    return OfDamped(upper[::-1, ::-1], used)


def damped_inverse(gram: Array, damping: Array, shift: Array | float = 0.0) -> OfDamped:
    """Inverts G + (damping mean(diag G) + shift) I, damping raised as by `inverse_factor`."""

    def attempt(damped: Array) -> Array:
        return inverse(jnp.fill_diagonal(damped, jnp.diagonal(damped) + shift, inplace=False))

    return OfDamped(*_with_enough_damping(attempt, gram, damping))


def _with_enough_damping(
    attempt: Callable[[Array], Array], gram: Array, damping: Array
) -> tuple[Array, Array]:
    """What is made of the damped Gram, and the damping: raised until the last entry is finite."""

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        result, used, following = state
        first = jnp.isnan(used) & ~jnp.isnan(following)
        return ~jnp.isfinite(result[-1, -1]) & (first | (used < LARGEST_DAMPING))

    def advance(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        used = state[2]
        following = jnp.clip(RAISE * used, FIRST_RAISED_DAMPING, LARGEST_DAMPING)
        return attempt(damped_gram(gram, used)), used, following

    # One loop, so that the attempt is compiled once.
    nothing = (jnp.full_like(gram, jnp.nan), jnp.full_like(damping, jnp.nan), damping)
    result, used, _ = lax.while_loop(unfinished, advance, nothing)
    return result, jnp.where(jnp.isfinite(result[-1, -1]), used, damping)


# Wide products keep a machine busy; the pivots of a narrow block come one after the other.
WIDEST_BLOCK, INNER_BLOCK = 256, 16


def inverse(matrix: Array) -> Array:
    """The inverse of a positive definite matrix; NaN in every entry of one that is not.

    It sweeps the columns block by block: the elimination of Gauss and Jordan, in a form that stays
    symmetric. With A partitioned into a block K and the rest R, a sweep puts
    A_RR - A_RK A_KK^-1 A_KR, A_RK A_KK^-1 and -A_KK^-1 in their places. After all of them A is
    -A^-1, and -A has become A^-1. Blocks are inverted the same way in smaller blocks, down to
    single entries, the pivots. They are all positive if and only if the matrix is definite, to
    rounding (docs/theory.md, section 14). On GPUs a block is inverted by its Cholesky factor, which
    fails for the same matrices. Each step of a loop is a launch there, and single pivots would be
    thousands of launches.

    Nearly all of the 2 n^3 operations are in products (n, b) x (b, n). A Cholesky factorization
    with two triangular solves takes 7/3 n^3. One more matrix is in memory besides the result.
    Devices that share the columns send one another the rows of a block. Only the upper triangle is
    read.

    References:
      Goodnight, "A Tutorial on the SWEEP Operator", The American Statistician 33 (1979).
    """
    width = len(matrix)
    # Blocks that divide the width: nothing is filled up.
    for block in range(WIDEST_BLOCK, WIDEST_BLOCK // 2 - 1, -INNER_BLOCK):
        if width % block == 0:
            return _swept(-matrix, (block, INNER_BLOCK, 1))
    blocks = math.ceil(width / WIDEST_BLOCK)
    block = math.ceil(width / blocks / INNER_BLOCK) * INNER_BLOCK
    identity = jnp.eye(blocks * block, dtype=matrix.dtype)
    padded = identity.at[:width, :width].set(matrix)
    return _swept(-padded, (block, INNER_BLOCK, 1))[:width, :width]


def _swept(negated: Array, blocks: Sequence[int]) -> Array:
    """The inverse of -negated by blocks of the first size, and of their pivots by the others."""
    block, *inner = blocks
    width = len(negated)
    block_of = jnp.arange(width) // block

    def sweep(index: Array, matrix: Array) -> Array:
        start = index * block
        # Without the barrier XLA may gather a matrix that is in parts, and then slice it.
        rows = lax.optimization_barrier(lax.dynamic_slice(matrix, (start, 0), (block, width)))
        rows = replicated(rows)
        pivot = lax.dynamic_slice(rows, (0, start), (block, block))
        inverted = _inverted_pivot(pivot, inner)
        # With I in the block's own place one product serves all four parts.
        rows = replicated(
            lax.dynamic_update_slice(rows, jnp.eye(block, dtype=rows.dtype), (0, start))
        )
        scaled = matmul(inverted, rows)
        swept = replicated(block_of == index)
        rest = jnp.where(swept[:, None] | swept[None, :], 0, matrix)
        return rest + matmul(rows.T, scaled)

    return lax.fori_loop(0, width // block, sweep, negated)


def _inverted_pivot(negated: Array, blocks: Sequence[int]) -> Array:
    """The inverse of -negated, a block of the diagonal; NaN where that is not definite."""
    if not blocks:
        pivot = -negated
        return jnp.where((pivot > 0) & (pivot < jnp.inf), 1 / pivot, jnp.nan)
    by_sweeps = functools.partial(_swept, blocks=blocks)
    if len(blocks) == 1:
        return by_sweeps(negated)
    return lax.platform_dependent(negated, cuda=_by_cholesky, rocm=_by_cholesky, default=by_sweeps)


def _by_cholesky(negated: Array) -> Array:
    # A pivot of Inf would have an inverse of zero.
    upper = jnp.triu(jnp.where(jnp.isinf(negated), jnp.nan, -negated))
    factor = jnp.linalg.cholesky(upper + jnp.triu(upper, 1).T, symmetrize_input=False)
    identity = jnp.eye(len(negated), dtype=negated.dtype)
    inverse = lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
    return matmul(inverse.T, inverse)
