"""Masked updates: the least squares over the kept weights, by gradients or conjugate gradients."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from prox24.solvers.problem import PRECISION, Normalized
from prox24.solvers.proximal import eigenvalue_bound


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConjugateGradients:
    """Preconditioned conjugate gradients on the kept weights, all rows at once.

    Each row w solves G_SS w_S = (G w0)_S on its own support S. The preconditioner is the diagonal
    of the Gram, which is the identity on a normalized problem. The loss never rises.

    Attributes:
      steps: iterations, each one product with the Gram.
    """

    steps: int = 20

    def __call__(self, problem: Normalized, weight: Array, mask: Array) -> Array:
        """The refitted weight, zero outside the mask; all arrays are (out, in)."""

        def apply(direction: Array) -> Array:
            return jnp.where(mask, jnp.matmul(direction, problem.gram, precision=PRECISION), 0)

        class State(NamedTuple):
            weight: Array
            residual: Array
            direction: Array
            square: Array

        def advance(_: Array, state: State) -> State:
            image = apply(state.direction)
            curvature = jnp.sum(state.direction * image, axis=1, keepdims=True)
            # A row that has converged stays where it is: its next steps would be rounding noise.
            active = (state.square > floor) & (curvature > 0)
            length = jnp.where(active, state.square / curvature, 0)
            residual = state.residual - length * image
            square = jnp.sum(residual * residual, axis=1, keepdims=True)
            turn = jnp.where(active, square / state.square, 0)
            return State(
                weight=state.weight + length * state.direction,
                residual=residual,
                direction=residual + turn * state.direction,
                square=square,
            )

        residual = apply(problem.weight - weight)
        square = jnp.sum(residual * residual, axis=1, keepdims=True)
        floor = square * jnp.finfo(square.dtype).eps ** 2
        start = State(weight, residual, residual, square)
        return lax.fori_loop(0, self.steps, advance, start).weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientSteps:
    """Any optax transform on the gradient (W - W0) G of half the loss, masked to the kept weights.

    Attributes:
      transform: an `optax.GradientTransformation`, or None for plain gradient descent with step
        1/L, where L bounds the largest eigenvalue of the normalized Gram.
      steps: iterations, each one product with the Gram.

    Example:
      >>> GradientSteps(optax.adam(1e-3), steps=100).steps
      100
    """

    transform: optax.GradientTransformation | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    steps: int = 1000

    def __call__(self, problem: Normalized, weight: Array, mask: Array) -> Array:
        """The refitted weight, zero outside the mask; all arrays are (out, in)."""
        transform = self.transform or optax.scale(-1 / eigenvalue_bound(problem.gram))

        def advance(_: Array, state: tuple[Array, optax.OptState]) -> tuple[Array, optax.OptState]:
            weight, memory = state
            difference = weight - problem.weight
            gradient = jnp.matmul(difference, problem.gram, precision=PRECISION)
            updates, memory = transform.update(jnp.where(mask, gradient, 0), memory, weight)
            stepped = optax.apply_updates(weight, updates)
            return jnp.where(mask, stepped, 0), memory

        return lax.fori_loop(0, self.steps, advance, (weight, transform.init(weight)))[0]
