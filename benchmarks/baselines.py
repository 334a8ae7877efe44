"""Two published ways to prune a layer by ADMM with a projection, to compare `prox24.ADMM` with."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from prox24 import Candidate, LayerProblem, Normalized, Pattern, Patterns, hyperparameters
from prox24._core.masks import top_mask
from prox24._core.precision import PRECISION
from prox24._solvers.damping import damped_gram, damped_inverse
from prox24._solvers.problem import normalize


@hyperparameters
class ALPS:
    """The settings of ALPS, to be followed by 10 conjugate gradient steps, with damping 0.01.

    Rho grows every 3 steps, by a factor of 1.3, 1.2 or 1.1 where over 10%, over 0.5% or anything of
    the support changed. ALPS starts with U = 0 and the update of W. Here U follows from the first
    projection. ALPS returns the projection of W, here it is the projection of W + U. ALPS stops
    when less than 0.03% changed, from step 30 on. It restarts with a smaller rho where its first
    steps change nothing.

    References:
      "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
      arXiv 2406.07831.
    """

    patterns = Patterns.GROUPED
    needs_definite = True
    shares_columns = False

    steps: int = 300
    tolerance: float = 3e-4

    def __call__(self, problem: LayerProblem, pattern: Pattern, damping: Array) -> Candidate:
        problem = problem._replace(gram=damped_gram(problem.gram, damping))
        normalized = normalize(*problem)
        rows, width = normalized.weight.shape
        kept = rows * width * pattern.kept / pattern.group

        def unfinished(state: tuple[Split, Array, Array]) -> Array:
            split, _, changed = state
            return (split.steps < self.steps) & (changed >= self.tolerance)

        def advance(state: tuple[Split, Array, Array]) -> tuple[Split, Array, Array]:
            split, rho, _ = state
            response = responses(normalized, rho)
            before = split.sparse != 0
            for _ in range(3):
                split = split.step(normalized, response, projected(split.total, pattern))
            changed = jnp.sum((split.sparse != 0) != before, dtype=rho.dtype) / kept
            some = jnp.where(changed > 0, 1.1, 1.0)
            growth = jnp.where(changed > 0.1, 1.3, jnp.where(changed > 0.005, 1.2, some))
            growth = jnp.where(unfinished((split, rho, changed)), growth, 1).astype(rho.dtype)
            return split._replace(dual=split.dual / growth), rho * growth, changed

        dtype = normalized.weight.dtype
        start = Split.of(normalized), jnp.asarray(0.1, dtype), jnp.asarray(jnp.inf, dtype)
        split, _, _ = lax.while_loop(unfinished, advance, start)
        return split.candidate(normalized, projected(split.total, pattern) != 0, damping)


@hyperparameters
class Boza:
    """The iteration of Boza: a tenth of the Gram's diagonal is added to the diagonal, rho is 1.

    At step k = 1, 2, ... the fraction 1 - (1 - k / 15)^3 of the entries that the pattern does not
    keep is zero, those of least magnitude in the whole matrix. After step 15 the mask stays.

    References:
      "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938.
    """

    patterns = Patterns.GROUPED
    needs_definite = True
    shares_columns = False

    steps: int = 20
    gradual: float = 15.0

    def __call__(self, problem: LayerProblem, pattern: Pattern, damping: Array) -> Candidate:
        gram = problem.gram + 0.1 * jnp.diag(jnp.diagonal(problem.gram))
        normalized = normalize(problem.weight, damped_gram(gram, 0.0))
        response = responses(normalized, jnp.ones((), gram.dtype))

        def sparsified(total: Array, before: Array, step: Array) -> Array:
            within = projected(total, pattern)
            others = jnp.where(within == 0, jnp.abs(total), 0)
            ordered = jnp.sort(others.ravel())
            remaining = (1 - jnp.minimum(step / self.gradual, 1)) ** 3
            outside = ordered.size * (pattern.group - pattern.kept) / pattern.group
            place = jnp.clip(jnp.int32(ordered.size - remaining * outside) - 1, 0, ordered.size - 1)
            threshold = jnp.where(remaining > 0, ordered[place], jnp.inf)
            gradual = jnp.where(others > threshold, total, within)
            return jnp.where(step > self.gradual, jnp.where(before != 0, total, 0), gradual)

        def advance(_: Array, split: Split) -> Split:
            step = (split.steps + 1).astype(gram.dtype)
            return split.step(normalized, response, sparsified(split.total, split.sparse, step))

        split = lax.fori_loop(0, self.steps, advance, Split.of(normalized))
        last = projected(jnp.where(split.sparse != 0, split.total, 0), pattern)
        return split.candidate(normalized, top_mask(jnp.abs(last), pattern), damping)


class Split(NamedTuple):
    """W, U and Z of min f(W) over W = Z."""

    weight: Array
    dual: Array
    sparse: Array
    steps: Array

    @classmethod
    def of(cls, problem: Normalized) -> "Split":
        """The dense weight, with U = 0."""
        weight = problem.weight
        return cls(weight, jnp.zeros_like(weight), weight, jnp.zeros((), jnp.int32))

    @property
    def total(self) -> Array:
        """W + U."""
        return self.weight + self.dual

    def step(self, problem: Normalized, response: Array, sparse: Array) -> "Split":
        """U and W that follow from Z, which comes of W + U."""
        dual = self.total - sparse
        pulled = jnp.matmul(problem.weight - sparse + dual, response, precision=PRECISION)
        return Split(problem.weight - pulled, dual, sparse, self.steps + 1)

    def candidate(self, problem: Normalized, mask: Array, damping: Array) -> Candidate:
        """W + U on a mask, in the units of the layer."""
        return Candidate.of(self.total / problem.scale[None, :], mask, damping, steps=self.steps)


def projected(weight: Array, pattern: Pattern) -> Array:
    """The N largest of each block."""
    return jnp.where(top_mask(jnp.abs(weight), pattern), weight, 0)


def responses(problem: Normalized, rho: Array) -> Array:
    """rho (G + rho I)^-1."""
    return rho * damped_inverse(problem.gram, jnp.zeros_like(rho), shift=rho).matrix
