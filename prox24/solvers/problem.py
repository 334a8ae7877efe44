"""The layer-wise problem that every solver solves, and what a solver returns."""

import enum
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from prox24.core.pattern import Pattern, PatternLike, as_pattern

PRECISION = "highest"


class LayerProblem(NamedTuple):
    """min over sparse W of tr((W - W0) G (W - W0)^T), the squared error of a linear layer's output.

    Attributes:
      weight: W0, shape (out, in), floating; the layer computes x -> W0 x.
      gram: G = sum over calibration tokens of x x^T, or its mean, shape (in, in), symmetric and
        positive semidefinite. Solutions do not depend on its scale.
    """

    weight: Array
    gram: Array


class Status(enum.Enum):
    """How a solver ended."""

    SPARSE = "sparse"
    """The pattern holds and every entry is finite."""
    MAX_STEPS = "max_steps"
    """Some blocks were still dense after the last step and were cut to their largest entries."""
    NONFINITE = "nonfinite"
    """NaN or Inf appeared, in the input or because the damped Gram is not positive definite."""


class Candidate(NamedTuple):
    """What a solver passes on to the refit: a point of the pattern and how it was found.

    Attributes:
      weight: shape (out, in), zero outside the mask.
      mask: bool, shape (out, in), exactly N True in each block.
      dense_blocks: int32 scalar, the blocks that had more than N nonzeros when the steps ran out.
      steps: int32 scalar, iterations taken.
    """

    weight: Array
    mask: Array
    dense_blocks: Array
    steps: Array


class Statistics(NamedTuple):
    """Figures about a solution. Losses are relative to tr(W0 G W0^T), with G as given, undamped.

    Attributes:
      relative_loss: of the returned weight.
      relative_loss_before_refit: of the solver's weight.
      steps: the solver's iterations.
      refit_steps: the refit's iterations.
      dense_blocks: blocks that were cut to the pattern because the steps ran out.
      dead_features: input features that are zero in every calibration token.
      damping: what was added to the diagonal of the Gram, in its units.
    """

    relative_loss: float
    relative_loss_before_refit: float
    steps: int
    refit_steps: int
    dense_blocks: int
    dead_features: int
    damping: float


class Solution(NamedTuple):
    """A sparse weight, its mask, how it was reached, and figures about it.

    Attributes:
      weight: shape (out, in), the dtype of the problem's weight, exact zeros outside the mask.
      mask: bool, shape (out, in), exactly N True in each block.
      status: a `Status`.
      statistics: `Statistics`.
    """

    weight: Array
    mask: Array
    status: Status
    statistics: Statistics


class Normalized(NamedTuple):
    """A problem without units: the diagonal of the Gram is 1 and the mean magnitude of W0 is 1.

    Attributes:
      weight: W0 scaled, shape (out, in), float32 or float64.
      gram: shape (in, in).
      scale: shape (in,); a normalized weight divided by it is in the problem's units again.
    """

    weight: Array
    gram: Array
    scale: Array


def check_problem(problem: LayerProblem, pattern: PatternLike) -> Pattern:
    """Raises ValueError unless the shapes fit one another and the pattern divides the input."""
    pattern = as_pattern(pattern)
    weight, gram = problem.weight.shape, problem.gram.shape
    if len(weight) != 2 or gram != (weight[1], weight[1]):
        raise ValueError(f"weight {weight} and gram {gram} are not (out, in) and (in, in)")
    if weight[1] % pattern.group:
        raise ValueError(f"input width {weight[1]} is not divisible by {pattern.group}")
    return pattern


def damping_amount(gram: Array, damping: Array | float) -> Array:
    """`damping` times the mean of the Gram's diagonal: a scalar in the Gram's units."""
    return damping * jnp.mean(jnp.diagonal(gram))


def damped_gram(gram: Array, damping: Array | float) -> Array:
    """G + damping mean(diag G) I, with 1 on the diagonal where even that is zero.

    A Gram of fewer tokens than features is singular; damping makes it positive definite and says
    how far weights may move where the calibration saw nothing. A zero diagonal is left only when
    the damping is zero (a dead feature) or no token was seen at all.

    Args:
      gram: shape (in, in).
      damping: nonnegative, relative to the mean of the diagonal.

    Returns:
      Array of the shape and dtype of `gram`.
    """
    diagonal = jnp.diagonal(gram) + damping_amount(gram, damping)
    return jnp.fill_diagonal(gram, jnp.where(diagonal > 0, diagonal, 1), inplace=False)


def normalize(problem: LayerProblem, damping: Array | float) -> Normalized:
    """Damps the Gram and scales the problem to unit diagonal and unit mean magnitude.

    With D = diag(G)^(1/2) the loss is unchanged by W -> W D, G -> D^-1 G D^-1, and a multiple of
    the loss is left by dividing W by a scalar. Masks are unchanged by neither, but the strength of
    the penalty then means the same in every layer.
    """
    gram = damped_gram(problem.gram, damping)
    deviation = jnp.sqrt(jnp.diagonal(gram))
    magnitude = jnp.mean(jnp.abs(problem.weight * deviation[None, :]))
    scale = deviation / jnp.where(magnitude > 0, magnitude, 1)
    correlation = gram / (deviation[:, None] * deviation[None, :])
    return Normalized(problem.weight * scale[None, :], correlation, scale)


def quadratic_loss(difference: Array, gram: Array) -> Array:
    """tr(D G D^T) for a difference D of shape (out, in), a scalar."""
    return jnp.sum(jnp.matmul(difference, gram, precision=PRECISION) * difference)
