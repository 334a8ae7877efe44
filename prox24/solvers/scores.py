"""Masks by a score for each weight, without a change of the kept weights: magnitude and Wanda."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from prox24.core.masks import top_mask
from prox24.core.pattern import Pattern
from prox24.solvers.problem import Candidate, LayerProblem


def _masked(problem: LayerProblem, scores: Array, pattern: Pattern) -> Candidate:
    mask = top_mask(scores, pattern)
    none = jnp.zeros((), jnp.int32)
    return Candidate(jnp.where(mask, problem.weight, 0), mask, dense_blocks=none, steps=none)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Magnitude:
    """Keeps the N largest |W| of each block. Any N:M; does not look at the Gram."""

    def __call__(self, problem: LayerProblem, pattern: Pattern, damping: Array) -> Candidate:
        """Finds a candidate; traceable, with the pattern static."""
        del damping
        return _masked(problem, jnp.abs(problem.weight), pattern)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wanda:
    """Keeps the N largest |W_ij| sqrt(G_jj) of each block. Any N:M; uses the undamped Gram.

    References:
      "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695,
      equation 1.
    """

    def __call__(self, problem: LayerProblem, pattern: Pattern, damping: Array) -> Candidate:
        """Finds a candidate; traceable, with the pattern static."""
        del damping
        norms = jnp.sqrt(jnp.diagonal(problem.gram))
        return _masked(problem, jnp.abs(problem.weight) * norms[None, :], pattern)
