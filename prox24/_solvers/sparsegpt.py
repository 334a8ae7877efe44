"""SparseGPT: one sweep over the columns that prunes, and corrects later columns for each error."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax

from prox24._core.masks import largest_mask, top_mask
from prox24._core.pattern import AnyPattern, Unstructured
from prox24._core.placement import varying_like
from prox24._core.precision import matmul
from prox24._solvers.damping import inverse_factor
from prox24._solvers.hyperparameters import hyperparameters
from prox24._solvers.problem import Candidate, LayerProblem
from prox24._solvers.protocol import Patterns


@hyperparameters
class SparseGPT:
    """The optimal-brain-surgeon sweep of SparseGPT. Any N:M, and unstructured sparsity.

    Let U be upper triangular, and U^T U the inverse of the damped Gram. The sweep visits the
    columns in order. In each block of M it keeps the N entries with the largest score w^2 / U_jj^2.
    A pruned entry of column j has the error w / U_jj. This error times row j of U is subtracted
    from the later columns.

    The score of a unit is the loss of pruning it. It is the sum of the scores of its entries, each
    after the errors of the earlier entries. Without a pattern, scores compete within `block_size`
    columns of all rows.

    Attributes:
      block_size: number of columns updated together, before the rest of the matrix. The sweep takes
        the largest divisor of the width up to this number. With a pattern, the result depends on it
        only by rounding.

    References:
      "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774,
      algorithm 1.
    """

    patterns = Patterns.ANY
    needs_definite = True
    shares_columns = False

    block_size: int = dataclasses.field(default=128, metadata={"static": True})

    def __call__(self, problem: LayerProblem, pattern: AnyPattern, damping: Array) -> Candidate:
        """Finds a candidate; traceable, with the pattern static."""
        factor = inverse_factor(problem.gram, damping)
        block = columns_at_once(problem.weight.shape[1], pattern.width, self.block_size)
        weight, mask = _sweep(problem.weight.T, factor.matrix, pattern, block)
        return Candidate.of(weight.T, mask.T, factor.damping)


def columns_at_once(width: int, group: int, largest: int) -> int:
    """The largest divisor of the width in whole groups: at most `largest`, or one group."""
    candidates = range(group, max(largest, group) + 1, group)
    return max(block for block in candidates if width % block == 0)


STRIP = 8
"""Largest number of columns that are pruned one by one between two products, in whole groups."""


def _sweep(weight: Array, factor: Array, pattern: AnyPattern, block: int) -> tuple[Array, Array]:
    """The corrected weight, not yet cut, and its mask.

    All are (in, out): the entries of a column must be contiguous.
    """
    width, rows = weight.shape

    def prune_block(index: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, mask = state
        start = index * block
        columns = lax.dynamic_slice(weight, (start, 0), (block, rows))
        factor_rows = lax.dynamic_slice(factor, (start, 0), (block, width))
        local_factor = lax.dynamic_slice(factor_rows, (0, start), (block, block))
        kept, chosen, errors = _prune_columns(columns, local_factor, pattern)
        # The factor is upper triangular, so earlier columns get zero. The block's own columns are
        # replaced. On GPUs, adding a product to an array is one call of a library.
        updated = weight + matmul(-factor_rows.T, errors)
        return (
            lax.dynamic_update_slice(updated, kept, (start, 0)),
            lax.dynamic_update_slice(mask, chosen, (start, 0)),
        )

    weight = varying_like(weight, factor[0, 0])
    start = weight, jnp.zeros_like(weight, bool)
    return lax.fori_loop(0, width // block, prune_block, start)


def _prune_columns(
    columns: Array, factor: Array, pattern: AnyPattern
) -> tuple[Array, Array, Array]:
    """Prunes the columns of one block: kept values, mask and errors, each (block, rows)."""
    (block, rows), group = columns.shape, pattern.width
    strip = group * math.gcd(block // group, max(1, STRIP // group))
    negated = -factor

    def choose(entries: Array, corner: Array, start: Array) -> Array:
        if isinstance(pattern, Unstructured):
            return lax.dynamic_slice(chosen, (start, 0), (group, rows))
        errors = list[Array]()
        for i, entry in enumerate(entries):
            for j in range(i - i % pattern.unit, i):
                entry = entry - corner[j, i] * errors[j]
            errors.append(entry / corner[i, i])
        return top_mask(jnp.abs(jnp.stack(errors)), pattern, axis=0)

    def prune_strip(index: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        columns, record = state
        start = index * strip
        entries = lax.dynamic_slice(columns, (start, 0), (strip, rows))
        corner = lax.dynamic_slice(factor, (start, start), (strip, strip))
        masks, errors = list[Array](), list[Array]()
        for first in range(0, strip, group):
            own = slice(first, first + group)
            masks.append(choose(entries[own], corner[own, own], start + first))
            for i, kept in enumerate(masks[-1], first):
                errors.append(jnp.where(kept, 0, entries[i] / corner[i, i]))
                entries = entries - corner[i][:, None] * errors[-1][None, :]
        stacked, mask = jnp.stack(errors), jnp.concatenate(masks)
        both = jnp.stack([stacked, mask.astype(stacked.dtype)])
        later = lax.dynamic_slice(negated, (start, 0), (strip, block))
        return (
            columns + matmul(later.T, stacked),
            lax.dynamic_update_slice(record, both, (0, start, 0)),
        )

    if isinstance(pattern, Unstructured):
        scores = jnp.square(columns / jnp.diagonal(factor)[:, None])
        chosen = largest_mask(scores, pattern.kept(scores.size))
    # Errors and mask are one array: on GPUs each update of an array is a launch.
    start = columns, jnp.zeros_like(columns, shape=(2, *columns.shape))
    columns, (errors, mask) = lax.fori_loop(0, block // strip, prune_strip, start)
    return columns, mask > 0, errors
