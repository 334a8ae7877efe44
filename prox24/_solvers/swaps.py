"""Local search: each block in turn takes the best of all its masks, with the others fixed."""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from prox24._core.pattern import AnyPattern, Pattern
from prox24._core.precision import matmul
from prox24._solvers.hyperparameters import hyperparameters
from prox24._solvers.problem import Normalized, Refitted
from prox24._solvers.protocol import Patterns, n_of_m
from prox24._solvers.refit import ConjugateGradients
from prox24._solvers.sparsegpt import columns_at_once

MOST_MASKS = 1000
COLUMNS = 128
"""Number of columns whose residuals are updated after each block; the other columns follow
later."""


@hyperparameters
class Swaps:
    """Sweeps over the blocks that exchange kept for pruned weights, then conjugate gradients.

    With all other weights fixed, the loss of one block is a quadratic in its weights. A sweep
    tries all masks of the block, each with its best weights, and takes the best mask. All rows go
    at once. The damped loss never rises, and a sweep costs about as much as a sweep of SparseGPT. A
    sweep without an exchange is the last.

    Attributes:
      sweeps: maximal number of sweeps over all blocks, each followed by conjugate gradients.
      refit: updates all kept weights, before the first sweep and after each sweep.

    Raises:
      ValueError: the pattern has more than 1,000 masks.
    """

    patterns = Patterns.GROUPED
    needs_definite = True
    shares_columns = False

    sweeps: int = 2
    refit: ConjugateGradients = ConjugateGradients()

    def __call__(
        self, problem: Normalized, weight: Array, mask: Array, pattern: AnyPattern
    ) -> Refitted:
        """The refitted weight and its mask; all arrays are (out, in)."""
        pattern = n_of_m(pattern)
        if math.comb(pattern.group, pattern.kept) > MOST_MASKS:
            raise ValueError(f"swaps tries all masks of a block, and {pattern} has too many")
        choices = _choices(problem.gram, pattern)

        def sweep(state: _Swapping) -> _Swapping:
            before, _, sweeps = state
            swept = _sweep(problem, before, choices, pattern)
            after = self.refit(problem, swept.weight, swept.mask, pattern)
            exchanged = jnp.any(swept.mask != before.mask, axis=1)
            return after._replace(steps=before.steps + after.steps), exchanged, sweeps + 1

        def unfinished(state: _Swapping) -> Array:
            return jnp.any(state[1]) & (state[2] < self.sweeps)

        start = self.refit(problem, weight, mask, pattern)
        begun = start, jnp.ones_like(weight[:, 0], bool), jnp.zeros((), jnp.int32)
        refitted, exchanged, _ = lax.while_loop(unfinished, sweep, begun)
        return refitted._replace(exhausted=refitted.exhausted | exchanged)


_Swapping = tuple[Refitted, Array, Array]  # The refit, rows that exchanged, sweeps.


class _Choices(NamedTuple):
    """Matrices of the losses and weights, for every block H of the Gram and every mask.

    They apply to the unconstrained minimiser t of a block. M is the number of its entries.
    """

    inverse: Array  # H^-1, shape (blocks, M, M).
    masks: Array  # Bool, shape (masks, M).
    losses: Array  # B of the loss t^T B t, shape (blocks, masks, M, M).
    minimisers: Array  # A of the weights A t, shape (blocks, masks, M, M).


def _choices(gram: Array, pattern: Pattern) -> _Choices:
    kept = np.array(list(itertools.combinations(range(pattern.group), pattern.kept)))
    masks = np.zeros((len(kept), pattern.group), bool)
    np.put_along_axis(masks, kept, True, axis=1)
    masks = np.repeat(masks, pattern.unit, axis=1)
    blocks = len(gram) // pattern.width
    square = gram.reshape(blocks, pattern.width, blocks, pattern.width)
    inverse = jnp.linalg.inv(jnp.moveaxis(jnp.diagonal(square, axis1=0, axis2=2), -1, 0))
    # With the entries P pruned, (H^-1)_PP^-1 t_P holds P at zero. Kept entries have 1 on the
    # diagonal.
    pruned = ~masks[None]
    both = pruned[..., :, None] & pruned[..., None, :]
    identity = jnp.eye(pattern.width, dtype=gram.dtype)
    inner = jnp.linalg.inv(jnp.where(both, inverse[:, None], identity[None, None]))
    losses = jnp.where(both, inner, 0)
    minimisers = identity[None, None] - matmul(inverse[:, None], losses)
    return _Choices(inverse, jnp.asarray(masks), losses, minimisers)


_Arrays = tuple[Array, Array, Array]  # Weight, mask and slope, each (in, out).


def _sweep(problem: Normalized, state: Refitted, choices: _Choices, pattern: Pattern) -> Refitted:
    rows, width = state.weight.shape
    group = pattern.width
    columns = columns_at_once(width, group, COLUMNS)

    def improve_group(gram: Array, first: Array, index: Array, local: _Arrays) -> _Arrays:
        weight, mask, slope = local
        start = index * group
        block = first + index
        w = lax.dynamic_slice(weight, (start, 0), (group, rows))
        kept = lax.dynamic_slice(mask, (start, 0), (group, rows))
        r = lax.dynamic_slice(slope, (start, 0), (group, rows))
        t = w - matmul(choices.inverse[block], r)
        images = matmul(choices.losses[block], t[None])
        losses = jnp.sum(images * t[None], axis=1)
        present = jnp.all(choices.masks[:, :, None] == kept[None], axis=1)
        # Ties, up to rounding, do not change the mask.
        numbers = jnp.finfo(w.dtype)
        slack = 100 * numbers.eps * jnp.max(losses, axis=0) + numbers.tiny
        best = jnp.argmin(jnp.where(present, losses - slack[None], losses), axis=0)
        chosen = jax.nn.one_hot(best, len(choices.masks), axis=0, dtype=w.dtype)
        minimisers = matmul(choices.minimisers[block], t[None])
        better = jnp.sum(minimisers * chosen[:, None], axis=0)
        better_mask = choices.masks[best].T
        better = jnp.where(better_mask, better, 0)
        gram_rows = lax.dynamic_slice(gram, (start, 0), (group, columns))
        return (
            lax.dynamic_update_slice(weight, better, (start, 0)),
            lax.dynamic_update_slice(mask, better_mask, (start, 0)),
            slope + matmul(gram_rows.T, better - w),
        )

    def improve_columns(index: Array, whole: _Arrays) -> _Arrays:
        weight, mask, slope = whole
        start = index * columns
        part = tuple(lax.dynamic_slice(x, (start, 0), (columns, rows)) for x in whole)
        gram_rows = lax.dynamic_slice(problem.gram, (start, 0), (columns, width))
        local_gram = lax.dynamic_slice(gram_rows, (0, start), (columns, columns))
        improve = functools.partial(improve_group, local_gram, index * (columns // group))
        better, better_mask, _ = lax.fori_loop(0, columns // group, improve, part)
        moved = matmul(gram_rows.T, better - part[0])
        return (
            lax.dynamic_update_slice(weight, better, (start, 0)),
            lax.dynamic_update_slice(mask, better_mask, (start, 0)),
            slope + moved,
        )

    slope = matmul(problem.gram, (state.weight - problem.weight).T)
    start = (state.weight.T, state.mask.T, slope)
    weight, mask, _ = lax.fori_loop(0, width // columns, improve_columns, start)
    return state._replace(weight=weight.T, mask=mask.T)
