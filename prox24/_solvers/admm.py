"""ADMM between the squared loss and sparsity, by projection or by the exact proximal operator."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from prox24._core import planes
from prox24._core.masks import top_mask
from prox24._core.pattern import AnyPattern, Pattern
from prox24._core.precision import matmul
from prox24._solvers.damping import damped_gram, damped_inverse
from prox24._solvers.hyperparameters import hyperparameters
from prox24._solvers.problem import Candidate, LayerProblem, Normalized, normalize, relative_loss
from prox24._solvers.protocol import Patterns, n_of_m
from prox24._solvers.schedules import Exponential


@hyperparameters
class ADMM:
    """min 1/2 tr((W - W0) G (W - W0)^T) + lam R(Z) over W = Z, by alternating directions.

    Let U be the scaled dual variable. With rho and lam / rho from their schedules, a step is

        Z <- prox_{(lam / rho) R}(W + U)
        U <- W + U - Z
        V <- W0 - rho (W0 - Z + U) (G + rho I)^-1
        W <- Z + relaxation (V - Z).

    The result is the projection of the last W + U on the pattern. Without a penalty, Z is this
    projection in every step. With a penalty, the operator keeps undecided blocks dense: entries
    shrink before they become zero, and blocks of large entries are decided first.

    The cost of a pruned weight is its square times a curvature. The curvature is diag(G) if the
    other weights are fixed, and diag(G^-1)^-1 if they are free to follow. The features are scaled
    so that D = (diag(G) / diag(G^-1))^(1/2), the geometric mean of both, becomes the identity. A
    fixed point with rho = 1 is then a mask that no exchange of two weights of a block improves.
    This holds as far as D is the true curvature and the two are not coupled (docs/theory.md,
    section 13).

    Attributes:
      steps: number of steps, each with one product of the size of W0 G.
      rho: schedule of rho, which changes once every `interval` steps.
      penalty: schedule of lam / rho, which changes in every step. For 2:M its unit is 1 / mean |W0|
        of the normalized problem; for 1:M it has none. None projects, for any N:M.
      scaling: exponent of the second curvature, from 0 to 1: 0 takes diag(G) alone, and 1 takes
        diag(G^-1)^-1 alone.
      interval: number of steps from one change of rho to the next. Each change costs an inverse,
        with as many operations as the product G G.
      relaxation: length of a step of W, between 0 and 2. With 1, W is the minimiser V itself.
      history: number of steps with a recorded loss, each for one more product. It is compiled in.

    References:
      Boyd et al., "Distributed Optimization and Statistical Learning via the Alternating Direction
      Method of Multipliers" (2011), sections 3.1.1 and 3.4.3.

    Example:
      >>> ADMM(penalty=None).steps
      20
    """

    needs_definite = True
    shares_columns = True

    steps: int = 20
    rho: Exponential = Exponential.between(0.55, 1.15, 5)
    penalty: Exponential | None = Exponential.between(0.2, 2.0, 20)
    scaling: float = 0.5
    interval: int = 4
    relaxation: float = 1.3
    history: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def patterns(self) -> Patterns:
        """The patterns of the operator, or of the projection if there is no penalty."""
        return Patterns.GROUPED if self.penalty is None else Patterns.ONE_OR_TWO

    @classmethod
    def in_steps(cls, steps: int) -> "ADMM":
        """Stretches the default schedules to a number of steps, with at most five values of rho.

        Raises:
          ValueError: fewer than 4 steps.

        Example:
          >>> ADMM.in_steps(20) == ADMM()
          True
        """
        if steps < 4:
            raise ValueError(f"the default schedules need 4 steps or more, not {steps}")
        interval = math.ceil(steps / 5)
        return cls(
            steps,
            Exponential.between(0.55, 1.15, math.ceil(steps / interval)),
            Exponential.between(0.2, 2.0, steps),
            interval=interval,
        )

    def __call__(self, problem: LayerProblem, pattern: AnyPattern, damping: Array) -> Candidate:
        """Finds a candidate; traceable, with the pattern static."""
        pattern = n_of_m(pattern)
        inverted = damped_inverse(problem.gram, damping)
        gram = damped_gram(problem.gram, inverted.damping)
        diagonal = jnp.diagonal(gram)
        others_free = 1 / jnp.diagonal(inverted.matrix)
        curvature = diagonal * (others_free / diagonal) ** self.scaling
        normalized = normalize(problem.weight, gram, curvature, pattern.unit)
        final = _iterate(normalized, pattern, self)
        total = final.weight + final.dual
        return Candidate.of(
            total / normalized.scale[None, :],
            top_mask(jnp.abs(total), pattern),
            inverted.damping,
            steps=final.steps,
            damping_raised=final.damping_raised,
            history=final.history,
        )


class _State(NamedTuple):
    weight: Array
    dual: Array
    rho: Array
    penalty: Array
    damping_raised: Array
    steps: Array
    history: Array


def _iterate(problem: Normalized, pattern: Pattern, solver: ADMM) -> _State:
    """All steps from the dense weight."""
    start, gram, _ = problem
    penalty = solver.penalty

    def sparse(total: Array, strength: Array) -> Array:
        if penalty is None:
            return jnp.where(top_mask(jnp.abs(total), pattern), total, 0)
        blocks = planes.split(total, pattern)
        return planes.join(planes.prox(blocks, strength, pattern.kept, pattern.unit))

    def advance(state: _State, response: Array) -> _State:
        """One step; `response` is rho (G + rho I)^-1."""
        total = state.weight + state.dual
        sparsified = sparse(total, state.penalty)
        dual = total - sparsified
        pulled = matmul(start - sparsified + dual, response)
        minimiser, history = start - pulled, state.history
        weight = sparsified + solver.relaxation * (minimiser - sparsified)
        if solver.history:
            total = weight + dual
            kept = jnp.where(top_mask(jnp.abs(total), pattern), total, 0)
            history = history.at[state.steps].set(relative_loss(kept, problem), mode="drop")
        return state._replace(
            weight=weight,
            dual=dual,
            penalty=state.penalty if penalty is None else penalty.after(state.penalty),
            steps=state.steps + 1,
            history=history,
        )

    def advance_with_one_rho(state: _State) -> _State:
        # By rounding, scaled features can make a definite Gram indefinite again.
        inverted = damped_inverse(gram, jnp.zeros_like(state.rho), shift=state.rho)
        response = state.rho * inverted.matrix
        steps = jnp.minimum(jnp.maximum(solver.interval, 1), solver.steps - state.steps)
        end = lax.fori_loop(0, steps, lambda _, state: advance(state, response), state)
        # After the last step rho stays: the result projects W + U in the units of this rho.
        rho = jnp.where(end.steps < solver.steps, solver.rho.after(end.rho), end.rho)
        return end._replace(
            dual=end.dual * (end.rho / rho),
            rho=rho,
            damping_raised=end.damping_raised | (inverted.damping > 0),
        )

    dtype = start.dtype
    initial = _State(
        weight=start,
        dual=jnp.zeros_like(start),
        rho=jnp.asarray(solver.rho.first, dtype),
        penalty=jnp.asarray(0 if penalty is None else penalty.first, dtype),
        # Like an array, so that inside `jax.shard_map` they vary from device to device.
        damping_raised=jnp.zeros_like(start[0, 0], bool),
        steps=jnp.zeros((), jnp.int32),
        history=jnp.full_like(start[0, 0], jnp.nan, shape=solver.history),
    )
    return lax.while_loop(lambda state: state.steps < solver.steps, advance_with_one_rho, initial)
