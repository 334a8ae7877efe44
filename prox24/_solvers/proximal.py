"""Accelerated proximal gradient descent with a growing penalty, in planar layout."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from prox24._core import planes
from prox24._core.masks import nonzero_units, top_mask
from prox24._core.pattern import AnyPattern, Pattern
from prox24._core.precision import matmul
from prox24._solvers.damping import damped_gram
from prox24._solvers.descent import following_nesterov
from prox24._solvers.hyperparameters import hyperparameters
from prox24._solvers.problem import (
    Candidate,
    LayerProblem,
    Normalized,
    normalize,
    relative_loss,
)
from prox24._solvers.protocol import Patterns, n_of_m
from prox24._solvers.schedules import Exponential


@hyperparameters
class ProximalGradient:
    """W <- prox_{lam R / L}(Z - (Z - W0) G / L), with lam growing until every block is sparse.

    The problem is first normalized, to a unit diagonal of the Gram and a unit mean magnitude of the
    weight. So lam has no unit. Z extrapolates W with Nesterov's momentum. L bounds the largest
    eigenvalue of the normalized Gram. `ProximalGradient.paper()` is the paper's iteration.

    From 512 rows on, the rows are cut into up to eight equal parts. Once at most an eighth of the
    rows of each part hold a dense block, only these rows continue.

    Attributes:
      penalty: schedule of lam.
      momentum: 1 for Nesterov's sequence, 0 for no momentum, numbers between for a damped sequence.
      max_steps: maximal number of steps. The remaining dense blocks are then cut, and the status
        says so.
      history: number of steps with a recorded loss, each for one more product. It is compiled in.

    References:
      "A Proximal Operator for Inducing 2:4-Sparsity", arXiv 2501.18015, algorithm 1.
    """

    patterns = Patterns.ONE_OR_TWO
    needs_definite = False
    shares_columns = False

    penalty: Exponential = Exponential(0.01, 1.05)
    momentum: float = 1.0
    max_steps: int = 2000
    history: int = dataclasses.field(default=0, metadata={"static": True})

    @classmethod
    def paper(cls) -> "ProximalGradient":
        """The paper's iteration: no momentum, and lam growing by 1% a step.

        The paper's refit after it is 1,000 gradient steps.
        """
        return cls(Exponential(0.01, 1.01), momentum=0.0)

    def __call__(self, problem: LayerProblem, pattern: AnyPattern, damping: Array) -> Candidate:
        """Finds a candidate; traceable, with the pattern static."""
        pattern = n_of_m(pattern)
        gram = damped_gram(problem.gram, damping)
        normalized = normalize(problem.weight, gram, unit=pattern.unit)
        # The columns are sorted by plane. The product with the Gram then has an ordinary matrix,
        # and nothing is interleaved until the end.
        order = jnp.concatenate(planes.split(jnp.arange(problem.weight.shape[1]), pattern))
        start, gram = normalized.weight[:, order], normalized.gram[order][:, order]
        final = _iterate(start, gram, pattern, self)
        dense = planes.join(jnp.split(final.weight, pattern.width, axis=1))
        mask = top_mask(jnp.abs(dense), pattern)
        blocks = jnp.sum(final.dense_blocks)
        return Candidate.of(
            dense / normalized.scale[None, :],
            mask,
            damping,
            blocks,
            final.steps,
            history=final.history,
        )


class _State(NamedTuple):
    """Arrays of rows (out, in), numbers of each row (out, 1), and scalars."""

    origin: Array
    weight: Array
    extrapolated: Array
    nesterov: Array
    dense_blocks: Array
    penalty: Array
    steps: Array
    history: Array


def _iterate(start: Array, gram: Array, pattern: Pattern, solver: ProximalGradient) -> _State:
    bound = eigenvalue_bound(gram)
    step_size = 1 / bound
    # NaN would never become sparse.
    most_steps = jnp.where(jnp.isfinite(bound) & jnp.isfinite(jnp.sum(start)), solver.max_steps, 0)

    def advance(state: _State) -> _State:
        difference = state.extrapolated - state.origin
        gradient = matmul(difference, gram)
        target = jnp.split(state.extrapolated - step_size * gradient, pattern.width, axis=1)
        blocks = planes.prox(target, state.penalty * step_size, pattern.kept, pattern.unit)
        weight = jnp.concatenate(blocks, axis=1)
        move = weight - state.weight
        following, share = following_nesterov(state.nesterov)
        nonzeros = nonzero_units(blocks, pattern.unit)
        history = state.history
        if solver.history:
            entries = planes.join(blocks)
            kept = jnp.where(top_mask(jnp.abs(entries), pattern), entries, 0)
            ordered = jnp.concatenate(planes.split(kept, pattern), axis=1)
            loss = relative_loss(ordered, Normalized(start, gram, step_size))
            history = history.at[state.steps].set(loss, mode="drop")
        return state._replace(
            weight=weight,
            extrapolated=weight + solver.momentum * share * move,
            nesterov=following,
            dense_blocks=jnp.sum(nonzeros > pattern.kept, axis=1, keepdims=True, dtype=jnp.int32),
            penalty=solver.penalty.after(state.penalty),
            steps=state.steps + 1,
            history=history,
        )

    def run(state: _State, few: int) -> _State:
        """Runs until at most `few` rows of each part hold dense blocks, or the steps run out."""

        def unfinished(state: _State) -> Array:
            most = jnp.max(jnp.count_nonzero(state.dense_blocks.reshape(parts, -1), axis=1))
            return (most > few) & (state.steps < most_steps)

        return lax.while_loop(unfinished, advance, state)

    rows, dtype = len(start), start.dtype
    parts = math.gcd(rows, PARTS)
    initial = _State(
        origin=start,
        weight=start,
        extrapolated=start,
        nesterov=jnp.ones((), dtype),
        # Like an array, so that inside `jax.shard_map` it varies from device to device.
        dense_blocks=jnp.full_like(start[:, :1], start.shape[1] // pattern.width, jnp.int32),
        # One number for each row: with a single scalar XLA would round a division in another way.
        penalty=jnp.full((rows, 1), solver.penalty.first, dtype),
        steps=jnp.zeros((), jnp.int32),
        history=jnp.full_like(start[0, 0], jnp.nan, shape=solver.history),
    )
    few = rows // (8 * parts) if rows >= MANY_ROWS and not solver.history else 0
    first = run(initial, few)
    if not few:
        return first
    # Finished rows fill the remaining places.
    done = first.dense_blocks.reshape(parts, -1) == 0
    chosen = jnp.argsort(done, axis=1, stable=True)[:, :few]
    rest = run(_State(*(_take(part, chosen) if part.ndim == 2 else part for part in first)), 0)
    return rest._replace(
        weight=_put(first.weight, chosen, rest.weight),
        dense_blocks=_put(first.dense_blocks, chosen, rest.dense_blocks),
    )


def _take(array: Array, chosen: Array) -> Array:
    """Takes rows of each part of an array, by their numbers in the part, shape (parts, few)."""
    split = array.reshape(len(chosen), -1, array.shape[1])
    return jax.vmap(lambda part, rows: part[rows])(split, chosen).reshape(-1, array.shape[1])


def _put(array: Array, chosen: Array, rows: Array) -> Array:
    """Undoes `_take`: puts the rows back in their places."""
    split, rows = (x.reshape(len(chosen), -1, array.shape[1]) for x in (array, rows))
    put = jax.vmap(lambda part, places, values: part.at[places].set(values))
    return put(split, chosen, rows).reshape(array.shape)


MANY_ROWS = 512
"""From this number of rows on, it saves time to continue with an eighth of them."""

PARTS = 8
"""Number of equal parts within which rows are chosen. Devices with whole parts move no rows."""

EIGENVALUE_SQUARINGS = 5


def eigenvalue_bound(gram: Array) -> Array:
    """An upper bound of the largest eigenvalue of a positive semidefinite matrix.

    For every m, lambda_max <= |G^m|_F^(1/m), since the right side is the 2m-norm of the spectrum.
    Five squarings reach m = 32. The bound then exceeds lambda_max by a factor of at most
    rank^(1/64): 12% at rank 1536. A last factor allows for the rounding of the products.
    """
    power, log_norm, exponent = gram, jnp.zeros((), gram.dtype), 1
    for _ in range(EIGENVALUE_SQUARINGS):
        # power is G^exponent / exp(log_norm), kept at norm 1 so that squaring cannot overflow.
        norm = jnp.linalg.norm(power)
        power = power / jnp.where(norm > 0, norm, 1)
        power = matmul(power, power)
        log_norm = 2 * (log_norm + jnp.log(norm))
        exponent *= 2
    bound = jnp.exp((log_norm + jnp.log(jnp.linalg.norm(power))) / exponent)
    # The rounding of a sum of n products is at most n eps.
    return bound * (1 + gram.shape[0] * jnp.finfo(gram.dtype).eps)
