"""Refits: least squares over the kept weights, by conjugate gradients, by gradients, or exactly."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from prox24._core.pattern import AnyPattern
from prox24._core.precision import matmul
from prox24._solvers.hyperparameters import hyperparameters
from prox24._solvers.problem import Normalized, Refitted
from prox24._solvers.protocol import Patterns
from prox24._solvers.proximal import eigenvalue_bound


@hyperparameters
class ConjugateGradients:
    """Preconditioned conjugate gradients on the kept weights, all rows at once.

    Each row w solves G_SS w_S = (G w0)_S on its own support S. The preconditioner is the diagonal
    of the Gram, which is the identity on a normalized problem. The damped loss never rises.

    Attributes:
      steps: maximal number of iterations, each with one product with the Gram.
      tolerance: a row stops when four steps lower its loss by less than this fraction. A single
        step is no test, since a small gain may come before large ones. The refit ends when at most
        one row of 64 still moves.
    """

    patterns = Patterns.ANY
    needs_definite = False
    shares_columns = True

    steps: int = 20
    tolerance: float = 3e-3

    def __call__(
        self, problem: Normalized, weight: Array, mask: Array, pattern: AnyPattern
    ) -> Refitted:
        """The refitted weight; all arrays are (out, in)."""
        del pattern

        def apply(direction: Array) -> Array:
            return matmul(direction, problem.gram)

        def dot(a: Array, b: Array) -> Array:
            return jnp.sum(a * b, axis=1, keepdims=True)

        def advance(state: _Descent) -> _Descent:
            image = jnp.where(mask, apply(state.direction), 0)
            curvature = dot(state.direction, image)
            # A finished row does not move: its next steps would be rounding noise.
            moves = state.active & (curvature > 0)
            length = jnp.where(moves, state.square / curvature, 0)
            residual = state.residual - length * image
            square = dot(residual, residual)
            turn = jnp.where(moves, square / state.square, 0)
            loss = jnp.maximum(state.loss - length * state.square, 0)
            steps = state.steps + 1
            looks = steps % WINDOW == 0
            still = looks & (state.earlier_loss - loss < self.tolerance * loss)
            return _Descent(
                weight=state.weight + length * state.direction,
                residual=residual,
                direction=residual + turn * state.direction,
                square=square,
                loss=loss,
                earlier_loss=jnp.where(looks, loss, state.earlier_loss),
                active=moves & ~still & (square > floor),
                steps=steps,
            )

        def unfinished(state: _Descent) -> Array:
            # The sum is positive if more than one of 64 rows still moves. A step costs the same for
            # one row as for all. Unlike a sum of losses, a count does not depend on the devices.
            votes = jnp.where(state.active, STRAGGLERS - 1, jnp.where(started, -1, 0))
            return (jnp.sum(votes, dtype=jnp.int32) > 0) & (state.steps < self.steps)

        difference = problem.weight - weight
        slope = apply(difference)
        residual = jnp.where(mask, slope, 0)
        square = dot(residual, residual)
        floor = square * jnp.finfo(square.dtype).eps ** 2
        loss = dot(difference, slope)
        started = square > 0
        start = _Descent(
            weight=weight,
            residual=residual,
            direction=residual,
            square=square,
            loss=loss,
            earlier_loss=loss,
            active=started,
            steps=jnp.zeros((), jnp.int32),
        )
        final = lax.while_loop(unfinished, advance, start)
        exhausted = final.active[:, 0] & (final.steps >= self.steps)
        return Refitted(final.weight, mask, final.steps, exhausted)


WINDOW = 4
STRAGGLERS = 64
"""Number of rows of which one may still move when the refit ends."""


class _Descent(NamedTuple):
    weight: Array
    residual: Array
    direction: Array
    square: Array
    loss: Array
    earlier_loss: Array
    active: Array
    steps: Array


@hyperparameters
class GradientSteps:
    """Any optax transform on the gradient (W - W0) G of half the loss, masked to the kept weights.

    There is no stop test.

    Attributes:
      transform: an `optax.GradientTransformation` that needs no loss values. Make it once, since
        each new object is compiled again. None is plain gradient descent with step 1/L, where L
        bounds the largest eigenvalue of the normalized Gram.
      steps: number of iterations, each with one product with the Gram.

    Example:
      >>> GradientSteps(optax.adam(1e-3), steps=100).steps
      100
    """

    patterns = Patterns.ANY
    needs_definite = False
    shares_columns = False

    transform: optax.GradientTransformation | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    steps: int = 1000

    def __call__(
        self, problem: Normalized, weight: Array, mask: Array, pattern: AnyPattern
    ) -> Refitted:
        """The refitted weight; all arrays are (out, in)."""
        del pattern
        transform = self.transform
        if transform is None:
            transform = optax.scale(-1 / eigenvalue_bound(problem.gram))

        def advance(_: Array, state: tuple[Array, optax.OptState]) -> tuple[Array, optax.OptState]:
            weight, memory = state
            difference = weight - problem.weight
            gradient = matmul(difference, problem.gram)
            updates, memory = transform.update(jnp.where(mask, gradient, 0), memory, weight)
            stepped = optax.apply_updates(weight, updates)
            return jnp.where(mask, stepped, 0), memory

        final, _ = lax.fori_loop(0, self.steps, advance, (weight, transform.init(weight)))
        exhausted = jnp.zeros(len(weight), bool)
        return Refitted(final, mask, jnp.asarray(self.steps, jnp.int32), exhausted)


@hyperparameters
class LeastSquares:
    """The exact minimiser on the kept weights: one Cholesky factorization of G_SS for each row.

    It is a reference: a row takes in^3 / 3 operations, and a step of conjugate gradients takes
    2 in^2.
    """

    patterns = Patterns.ANY
    needs_definite = True
    shares_columns = False

    def __call__(
        self, problem: Normalized, weight: Array, mask: Array, pattern: AnyPattern
    ) -> Refitted:
        """The refitted weight; all arrays are (out, in)."""
        del weight, pattern

        def solve_row(row: tuple[Array, Array]) -> Array:
            target, kept = row
            # The identity outside the support lets one shape serve every mask.
            both = kept[:, None] & kept[None, :]
            inner = jnp.where(both, problem.gram, jnp.diag((~kept).astype(target.dtype)))
            factor = jnp.linalg.cholesky(inner)
            return jax.scipy.linalg.cho_solve((factor, True), jnp.where(kept, target, 0))

        targets = matmul(problem.weight, problem.gram)
        solved = lax.map(solve_row, (targets, mask))
        exhausted = jnp.zeros(len(mask), bool)
        return Refitted(jnp.where(mask, solved, 0), mask, jnp.zeros((), jnp.int32), exhausted)
