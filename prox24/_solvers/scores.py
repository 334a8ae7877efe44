"""Masks by a score of each weight, magnitude or Wanda; the kept weights do not change."""

import jax.numpy as jnp
from jax import Array

from prox24._core.masks import largest_mask, top_mask
from prox24._core.pattern import AnyPattern, Unstructured
from prox24._solvers.hyperparameters import hyperparameters
from prox24._solvers.problem import Candidate, LayerProblem
from prox24._solvers.protocol import Patterns


@hyperparameters
class Magnitude:
    """Keeps the largest |W| of each block, or of the whole matrix; it does not use the Gram."""

    patterns = Patterns.ANY
    needs_definite = False
    shares_columns = True

    def __call__(self, problem: LayerProblem, pattern: AnyPattern, damping: Array) -> Candidate:
        """Finds a candidate; traceable, with the pattern static."""
        return _keep_largest(problem, jnp.abs(problem.weight), pattern, damping)


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
        return _keep_largest(problem, scores, pattern, damping, axis=1)


def _keep_largest(
    problem: LayerProblem,
    scores: Array,
    pattern: AnyPattern,
    damping: Array,
    axis: int | None = None,
) -> Candidate:
    """Keeps the largest scores; without a pattern, those along the axis or of the whole matrix."""
    if isinstance(pattern, Unstructured):
        competing = scores.size if axis is None else scores.shape[axis]
        mask = largest_mask(scores, pattern.kept(competing), axis)
    else:
        mask = top_mask(scores, pattern)
    return Candidate.of(problem.weight, mask, damping)
