"""ADMM between the squared loss and sparsity, by projection or by the exact proximal operator."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from prox24.core import planes
from prox24.core.masks import top_mask
from prox24.core.pattern import Pattern, Unstructured
from prox24.core.precision import PRECISION
from prox24.solvers.damping import damped_gram, damped_inverse
from prox24.solvers.hyperparameters import hyperparameters
from prox24.solvers.planar import changed, check_grouped, project
from prox24.solvers.problem import Candidate, LayerProblem, Normalized, normalize
from prox24.solvers.schedules import Exponential, Progress, Schedule, SupportSteps

Planes = Sequence[Array]
"""A weight (out, in) as M arrays (out, in / M): plane i holds the i-th entry of every block."""


@hyperparameters
class Projection:
    """Z is the nearest point of the pattern, in every step. Any N:M."""

    def __call__(
        self, blocks: Planes, before: Planes, pattern: Pattern, progress: Progress
    ) -> list[Array]:
        """Z from W + U, planar."""
        del before, progress
        return project(blocks, pattern)

    def end(self, blocks: Planes, before: Planes, pattern: Pattern) -> list[Array]:
        """The sparse weight from the last W + U, planar."""
        del before
        return project(blocks, pattern)


@hyperparameters
class GradualProjection:
    """The N largest of each block stay, and of the others ever fewer. Any N:M.

    At step k = 1, 2, ... the fraction 1 - (1 - k / steps)^3 of the entries that the pattern does
    not keep is zero, those of least magnitude in the whole matrix. At step `steps` all of them are,
    and from then on the mask stays.

    Attributes:
      steps: until only the pattern is left.

    References:
      "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938.
    """

    steps: float = 15.0

    def __call__(
        self, blocks: Planes, before: Planes, pattern: Pattern, progress: Progress
    ) -> list[Array]:
        """Z from W + U, planar."""
        projected = project(blocks, pattern)
        others = [
            jnp.where(kept == 0, jnp.abs(plane), 0)
            for kept, plane in zip(projected, blocks, strict=True)
        ]
        ordered = jnp.sort(jnp.concatenate([plane.ravel() for plane in others]))
        step = (progress.steps + 1).astype(ordered.dtype)
        remaining = (1 - jnp.minimum(step / self.steps, 1)) ** 3
        outside = ordered.size * (pattern.group - pattern.kept) / pattern.group
        place = jnp.clip(jnp.int32(ordered.size - remaining * outside) - 1, 0, ordered.size - 1)
        threshold = jnp.where(remaining > 0, ordered[place], jnp.inf)
        gradual = [
            jnp.where(other > threshold, plane, kept)
            for other, plane, kept in zip(others, blocks, projected, strict=True)
        ]
        same = self.end(blocks, before, pattern)
        return [jnp.where(step > self.steps, *pair) for pair in zip(same, gradual, strict=True)]

    def end(self, blocks: Planes, before: Planes, pattern: Pattern) -> list[Array]:
        """The sparse weight from the last W + U, on the last support, planar."""
        kept = [jnp.where(z != 0, plane, 0) for plane, z in zip(blocks, before, strict=True)]
        return project(kept, pattern)


@hyperparameters
class Shrinkage:
    """Z is prox_{(lam / rho) R}(W + U), with lam / rho as scheduled. 1:M and 2:M.

    It keeps what is undecided: entries shrink before they leave, and blocks of large entries are
    decided before blocks of small ones.

    Attributes:
      penalty: the schedule of lam / rho: for 2:M in units of 1 / mean |W0| of the normalized
        problem, for 1:M without a unit.

    Raises:
      ValueError: on a pattern other than 1:M and 2:M.
    """

    penalty: Schedule = Exponential.between(0.3, 2.0, 24)

    def __call__(
        self, blocks: Planes, before: Planes, pattern: Pattern, progress: Progress
    ) -> list[Array]:
        """Z from W + U, planar."""
        del before
        return list(planes.prox(blocks, progress.value, pattern.kept))

    def end(self, blocks: Planes, before: Planes, pattern: Pattern) -> list[Array]:
        """The sparse weight from the last W + U: their projection, planar."""
        del before
        return project(blocks, pattern)


Sparsifier = Projection | GradualProjection | Shrinkage


@hyperparameters
class ADMM:
    """min 1/2 tr((W - W0) G (W - W0)^T) + lam R(Z) over W = Z, by alternating directions.

    With U the scaled dual variable, a step is Z <- sparsify(W + U), U <- W + U - Z,
    W <- W0 - rho (W0 - Z + U) (G + rho I)^-1, with rho as scheduled. What is returned is the
    projection of the last W + U.

    The features are scaled so that D = (diag(G) / diag(G^-1))^(1/2) becomes the identity, the
    geometric mean of what a weight costs with the others fixed and with the others free to follow.
    A fixed point with rho = 1 is then a mask that no exchange of two weights of a block improves,
    as far as D is what a weight costs (docs/theory.md, section 13). `scaling` 0 takes diag(G)
    alone, and 1 takes diag(G^-1)^-1.

    Attributes:
      steps: each with one product of the size of W0 G.
      rho: schedule of rho, which moves once every `interval` steps.
      sparsify: how Z is found: by the proximal operator, or by a projection.
      scaling: exponent of the second curvature, from 0 to 1.
      interval: steps between two moves of rho; each move costs an inverse, as many operations as
        the product G G.
      tolerance: the steps end early when `Progress.changed` is below it.

    Raises:
      ValueError: the pattern is not one that `sparsify` supports.

    Example:
      >>> ADMM(sparsify=Projection()).steps
      24
    """

    steps: int = 24
    rho: Schedule = Exponential.between(0.5, 1.2, 6)
    sparsify: Sparsifier = Shrinkage()
    scaling: float = 0.5
    interval: int = 4
    tolerance: float = 0.0

    @classmethod
    def in_steps(cls, steps: int) -> "ADMM":
        """The default schedules, stretched to a number of steps, with six values of rho at most.

        Raises:
          ValueError: fewer than 4 steps.

        Example:
          >>> ADMM.in_steps(24) == ADMM()
          True
        """
        if steps < 4:
            raise ValueError(f"the default schedules need 4 steps or more, not {steps}")
        interval = math.ceil(steps / 6)
        return cls(
            steps,
            Exponential.between(0.5, 1.2, math.ceil(steps / interval)),
            Shrinkage(Exponential.between(0.3, 2.0, steps)),
            interval=interval,
        )

    @classmethod
    def alps(cls) -> "ADMM":
        """The settings of ALPS, to be followed by 10 conjugate gradient steps, damping 0.01.

        ALPS starts with U = 0 and the update of W, here U follows from the first projection; it
        returns the projection of W, here that of W + U; it stops at less than 0.03% changed from
        step 30 on only, and restarts with a smaller rho where its first steps change nothing.

        References:
          "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
          Models", arXiv 2406.07831.
        """
        return cls(300, SupportSteps(0.1), Projection(), 0.0, interval=3, tolerance=3e-4)

    @classmethod
    def boza(cls) -> "ADMM":
        """The settings of Boza, for a Gram with a tenth of its diagonal added to the diagonal.

        With `gram + 0.1 * jnp.diag(jnp.diagonal(gram))` and damping 0 it is the published
        iteration.

        References:
          "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938.
        """
        return cls(20, Exponential(1.0, 1.0), GradualProjection(15.0), 0.0, interval=20)

    def __call__(
        self, problem: LayerProblem, pattern: Pattern | Unstructured, damping: Array
    ) -> Candidate:
        """Finds a candidate; traceable, with the pattern static."""
        pattern = check_grouped(pattern, "ADMM")
        if isinstance(self.sparsify, Shrinkage):
            planes.check_kept(*pattern)
        inverted = damped_inverse(problem.gram, damping)
        gram = damped_gram(problem.gram, inverted.damping)
        diagonal = jnp.diagonal(gram)
        others_free = 1 / jnp.diagonal(inverted.matrix)
        curvature = diagonal * (others_free / diagonal) ** self.scaling
        normalized = normalize(problem.weight, gram, curvature)
        final = _iterate(normalized, pattern, self)
        blocks = planes.split(final.weight + final.dual, pattern)
        before = planes.split(final.sparse, pattern)
        sparse = planes.join(self.sparsify.end(blocks, before, pattern))
        mask = top_mask(jnp.abs(sparse), pattern)
        scale = normalized.scale[None, :]
        return Candidate.of(
            sparse / scale,
            mask,
            inverted.damping,
            steps=final.steps,
            damping_raised=final.damping_raised,
        )


class _State(NamedTuple):
    weight: Array
    dual: Array
    sparse: Array
    rho: Array
    penalty: Array
    changed: Array
    damping_raised: Array
    steps: Array


def _iterate(problem: Normalized, pattern: Pattern, solver: ADMM) -> _State:
    """All steps from the dense weight."""
    start, gram, _ = problem
    penalty = solver.sparsify.penalty if isinstance(solver.sparsify, Shrinkage) else None

    def advance(state: _State, response: Array) -> _State:
        """One step; `response` is rho (G + rho I)^-1."""
        total = state.weight + state.dual
        progress = Progress(state.penalty, state.steps, state.changed)
        before = planes.split(state.sparse, pattern)
        blocks = solver.sparsify(planes.split(total, pattern), before, pattern, progress)
        sparse = planes.join(blocks)
        dual = total - sparse
        pulled = jnp.matmul(start - sparse + dual, response, precision=PRECISION)
        steps = state.steps + 1
        return state._replace(
            weight=start - pulled,
            dual=dual,
            sparse=sparse,
            penalty=penalty(progress._replace(steps=steps)) if penalty else state.penalty,
            steps=steps,
        )

    def advance_with_one_rho(state: _State) -> _State:
        # What the damping made definite may be indefinite by rounding, once features are scaled.
        inverted = damped_inverse(gram, jnp.zeros_like(state.rho), shift=state.rho)
        response = state.rho * inverted.matrix
        steps = jnp.minimum(jnp.maximum(solver.interval, 1), solver.steps - state.steps)
        end = lax.fori_loop(0, steps, lambda _, state: advance(state, response), state)
        after, before = (planes.split(each.sparse, pattern) for each in (end, state))
        change = changed(after, before, pattern)
        next_rho = solver.rho(Progress(end.rho, end.steps, change))
        ends = (end.steps >= solver.steps) | (change < solver.tolerance)
        # The result is a projection of W + U, in units of the rho of the last step.
        rho = jnp.where(ends, end.rho, next_rho)
        return end._replace(
            dual=end.dual * (end.rho / rho),
            rho=rho,
            changed=change,
            damping_raised=end.damping_raised | (inverted.damping > 0),
        )

    def unfinished(state: _State) -> Array:
        return (state.steps < solver.steps) & ~(state.changed < solver.tolerance)

    dtype = start.dtype
    initial = _State(
        weight=start,
        dual=jnp.zeros_like(start),
        sparse=start,
        rho=jnp.asarray(solver.rho.first, dtype),
        penalty=jnp.asarray(penalty.first if penalty else 0, dtype),
        changed=jnp.asarray(jnp.inf, dtype),
        damping_raised=jnp.asarray(False),
        steps=jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(unfinished, advance_with_one_rho, initial)
