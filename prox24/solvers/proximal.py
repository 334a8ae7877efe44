"""Accelerated proximal gradient descent with a growing penalty, in planar layout."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from prox24.core import planes
from prox24.core.masks import top_mask
from prox24.core.pattern import Pattern
from prox24.solvers.problem import PRECISION, Candidate, LayerProblem, normalize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prox:
    """W <- prox_{lam R / L}(Z - (Z - W0) G / L), lam growing until every block is 2:4.

    The problem is normalized first (unit diagonal of the Gram, unit mean magnitude of the weight),
    so that lam has no units. Z extrapolates W with Nesterov's momentum, L bounds the largest
    eigenvalue of the normalized Gram. With momentum 0 this is the paper's iteration.

    Attributes:
      initial_penalty: lam of the first step.
      growth: factor of lam per step.
      momentum: 1 for Nesterov's sequence, 0 for none, between for a damped one.
      max_steps: steps after which blocks that are still dense are cut; the status then says so.

    Raises:
      ValueError: on a pattern other than 1:M and 2:M.

    References:
      "A Proximal Operator for Inducing 2:4-Sparsity", arXiv 2501.18015, algorithm 1.
    """

    initial_penalty: float = 0.01
    growth: float = 1.05
    momentum: float = 1.0
    max_steps: int = 2000

    def __call__(self, problem: LayerProblem, pattern: Pattern, damping: Array) -> Candidate:
        """Finds a candidate; traceable, with the pattern static."""
        planes.check_kept(*pattern)
        normalized = normalize(problem, damping)
        # Plane i of the blocks becomes a range of columns: the matrix product sees an ordinary
        # matrix, the proximal operator sees contiguous planes, and nothing is ever interleaved.
        order = jnp.concatenate(planes.split(jnp.arange(problem.weight.shape[1]), pattern))
        gram = normalized.gram[order][:, order]
        start = normalized.weight[:, order]
        final = _iterate(start, gram, pattern, self)
        weight = planes.join(jnp.split(final.weight, pattern.group, axis=1))
        mask = top_mask(jnp.abs(weight), pattern)
        weight = weight / normalized.scale[None, :]
        return Candidate(jnp.where(mask, weight, 0), mask, final.dense_blocks, final.steps)


class _State(NamedTuple):
    weight: Array
    extrapolated: Array
    penalty: Array
    nesterov: Array
    dense_blocks: Array
    steps: Array


def _iterate(start: Array, gram: Array, pattern: Pattern, solver: Prox) -> _State:
    step_size = 1 / eigenvalue_bound(gram)

    def advance(state: _State) -> _State:
        gradient = jnp.matmul(state.extrapolated - start, gram, precision=PRECISION)
        target = jnp.split(state.extrapolated - step_size * gradient, pattern.group, axis=1)
        blocks = planes.prox(target, state.penalty * step_size, pattern.kept)
        weight = jnp.concatenate(blocks, axis=1)
        nesterov = (1 + jnp.sqrt(1 + 4 * jnp.square(state.nesterov))) / 2
        momentum = solver.momentum * (state.nesterov - 1) / nesterov
        nonzeros = sum((plane != 0).astype(jnp.int32) for plane in blocks)
        return _State(
            weight=weight,
            extrapolated=weight + momentum * (weight - state.weight),
            penalty=state.penalty * solver.growth,
            nesterov=nesterov,
            dense_blocks=jnp.count_nonzero(nonzeros > pattern.kept).astype(jnp.int32),
            steps=state.steps + 1,
        )

    def unfinished(state: _State) -> Array:
        return (state.dense_blocks > 0) & (state.steps < solver.max_steps)

    initial = _State(
        weight=start,
        extrapolated=start,
        penalty=jnp.asarray(solver.initial_penalty, start.dtype),
        nesterov=jnp.ones((), start.dtype),
        dense_blocks=jnp.asarray(start.size // pattern.group, jnp.int32),
        steps=jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(unfinished, advance, initial)


EIGENVALUE_SQUARINGS = 5


def eigenvalue_bound(gram: Array) -> Array:
    """An upper bound of the largest eigenvalue of a positive semidefinite matrix.

    For every m, lambda_max <= |G^m|_F^(1/m), since the right side is the 2m-norm of the spectrum.
    With m = 32, reached by five squarings, it exceeds lambda_max by at most rank^(1/64): 12% at
    rank 1536. The rounding of the products is added.

    Args:
      gram: shape (n, n), symmetric positive semidefinite.

    Returns:
      Scalar of the dtype of `gram`.

    Example:
      >>> bool(3.0 <= eigenvalue_bound(jnp.diag(jnp.array([1.0, 2.0, 3.0]))) < 3.1)
      True
    """
    power, log_norm, exponent = gram, jnp.zeros((), gram.dtype), 1
    for _ in range(EIGENVALUE_SQUARINGS):
        # power is G^exponent / exp(log_norm), kept at norm 1 so that squaring cannot overflow.
        norm = jnp.linalg.norm(power)
        power = power / norm
        power = jnp.matmul(power, power, precision=PRECISION)
        log_norm = 2 * (log_norm + jnp.log(norm))
        exponent *= 2
    bound = jnp.exp((log_norm + jnp.log(jnp.linalg.norm(power))) / exponent)
    # Products of n terms are rounded by n eps at most.
    return bound * (1 + gram.shape[0] * jnp.finfo(gram.dtype).eps)
