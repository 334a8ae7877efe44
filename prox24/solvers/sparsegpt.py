"""SparseGPT: one sweep over the columns that prunes, and spreads each error over later columns."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from prox24.core.masks import top_mask
from prox24.core.pattern import Pattern
from prox24.solvers.problem import PRECISION, Candidate, LayerProblem, damped_gram


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseGPT:
    """The optimal-brain-surgeon sweep of SparseGPT. Any N:M.

    With U upper triangular and U^T U the inverse of the damped Gram, columns are visited in order.
    At each block of M the N entries of largest w^2 / U_jj^2 are kept; a pruned entry's error
    w / U_jj times row j of U is taken off the columns that follow.

    Attributes:
      block_size: the columns updated together before the rest of the matrix; the result does not
        depend on it but for rounding. The largest divisor of the width below it is taken.

    References:
      "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774,
      algorithm 1.
    """

    block_size: int = dataclasses.field(default=128, metadata={"static": True})

    def __call__(self, problem: LayerProblem, pattern: Pattern, damping: Array) -> Candidate:
        """Finds a candidate; traceable, with the pattern static."""
        weight, mask = _sweep(
            problem.weight,
            inverse_factor(damped_gram(problem.gram, damping)),
            pattern,
            _block_width(problem.weight.shape[1], pattern.group, self.block_size),
        )
        none = jnp.zeros((), jnp.int32)
        return Candidate(weight, mask, dense_blocks=none, steps=none)


def inverse_factor(gram: Array) -> Array:
    """Upper triangular U with U^T U = G^-1, NaN where G is not positive definite.

    Factoring G from its last row to its first gives G = R R^T with R upper triangular, so U = R^-1
    comes from one Cholesky factorization and one triangular solve, and G is never inverted.
    """
    lower = jnp.linalg.cholesky(gram[::-1, ::-1])
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)[::-1, ::-1]


def _block_width(width: int, group: int, largest: int) -> int:
    candidates = range(group, max(largest, group) + 1, group)
    return max(block for block in candidates if width % block == 0)


class _Sweep(NamedTuple):
    weight: Array
    mask: Array


def _sweep(weight: Array, factor: Array, pattern: Pattern, block: int) -> _Sweep:
    rows, width = weight.shape

    def prune_block(index: Array, state: _Sweep) -> _Sweep:
        start = index * block
        columns = lax.dynamic_slice(state.weight, (0, start), (rows, block))
        factor_rows = lax.dynamic_slice(factor, (start, 0), (block, width))
        local_factor = lax.dynamic_slice(factor_rows, (0, start), (block, block))
        kept, mask, errors = _prune_columns(columns, local_factor, pattern)
        # The factor is upper triangular: earlier columns get zero; the block's own are replaced.
        updated = state.weight - jnp.matmul(errors, factor_rows, precision=PRECISION)
        return _Sweep(
            lax.dynamic_update_slice(updated, kept, (0, start)),
            lax.dynamic_update_slice(state.mask, mask, (0, start)),
        )

    start = _Sweep(weight, jnp.zeros(weight.shape, bool))
    swept = lax.fori_loop(0, width // block, prune_block, start)
    return _Sweep(jnp.where(swept.mask, swept.weight, 0), swept.mask)


def _prune_columns(columns: Array, factor: Array, pattern: Pattern) -> tuple[Array, Array, Array]:
    """Prunes the columns of one block: kept values, mask and errors, each (rows, block)."""
    rows, block = columns.shape
    group = pattern.group
    diagonal = jnp.diagonal(factor)

    def prune_group(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        columns, mask, errors = state
        start = index * group
        entries = lax.dynamic_slice(columns, (0, start), (rows, group))
        scales = lax.dynamic_slice(diagonal, (start,), (group,))
        group_mask = top_mask(jnp.square(entries / scales[None, :]), pattern)
        group_errors = jnp.zeros_like(entries)
        for i in range(group):
            column = lax.dynamic_slice(columns, (0, start + i), (rows, 1))[:, 0]
            error = jnp.where(group_mask[:, i], 0, column / scales[i])
            row = lax.dynamic_slice(factor, (start + i, 0), (1, block))
            columns = columns - error[:, None] * row
            group_errors = group_errors.at[:, i].set(error)
        return (
            columns,
            lax.dynamic_update_slice(mask, group_mask, (0, start)),
            lax.dynamic_update_slice(errors, group_errors, (0, start)),
        )

    start = (columns, jnp.zeros(columns.shape, bool), jnp.zeros_like(columns))
    return lax.fori_loop(0, block // group, prune_group, start)
