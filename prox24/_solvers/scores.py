"""Masks by a score for each weight, without a change of the kept weights: magnitude and Wanda."""

import jax.numpy as jnp
from jax import Array

from prox24._core.masks import largest_mask, top_mask
from prox24._core.pattern import AnyPattern, Unstructured
from prox24._solvers.hyperparameters import hyperparameters
from prox24._solvers.problem import Candidate, LayerProblem
from prox24._solvers.protocol import Patterns


@hyperparameters
class Magnitude:
    """Keeps the largest |W| of each block, or of the whole matrix. Does not look at the Gram."""

    patterns = Patterns.ANY
    needs_definite = False
    shares_columns = True

    def __call__(self, problem: LayerProblem, pattern: AnyPattern, damping: Array) -> Candidate:
        """Finds a candidate; traceable, with the pattern static."""
        scores = jnp.abs(problem.weight)
        if isinstance(pattern, Unstructured):
            mask = largest_mask(scores, pattern.kept(scores.size))
        else:
            mask = top_mask(scores, pattern)
        return Candidate.of(problem.weight, mask, damping)


@hyperparameters
class Wanda:
    """Keeps the largest |W_ij| sqrt(G_jj) of each block, or of each row; uses the undamped Gram.

    References:
      "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695,
      equation 1.
    """

    patterns = Patterns.ANY
    needs_definite = False
    shares_columns = True

    def __call__(self, problem: LayerProblem, pattern: AnyPattern, damping: Array) -> Candidate:
        """Finds a candidate; traceable, with the pattern static."""
        deviation = jnp.sqrt(jnp.maximum(jnp.diagonal(problem.gram), 0))
        scores = jnp.abs(problem.weight) * deviation[None, :]
        if isinstance(pattern, Unstructured):
            mask = largest_mask(scores, pattern.kept(scores.shape[1]), axis=1)
        else:
            mask = top_mask(scores, pattern)
        return Candidate.of(problem.weight, mask, damping)
