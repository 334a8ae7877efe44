"""The layer-wise problem of all solvers, and the types of their results."""

import enum
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import auto_axes
from jax.typing import ArrayLike

from prox24._core.blocks import split, unit_norms
from prox24._core.pattern import Pattern
from prox24._core.placement import explicit_sharding
from prox24._core.precision import matmul, working_dtype
from prox24._core.tracing import is_traced
from prox24._solvers.damping import damped_inverse


class LayerProblem(NamedTuple):
    """min over sparse W of tr((W - W0) G (W - W0)^T), the squared error of a linear layer's output.

    For other targets Y, min |W X' - Y|^2, take W0 = Y X'^T G^-1; see `correct_inputs`.

    Attributes:
      weight: W0, shape (out, in), floating-point; the layer computes x -> W0 x.
      gram: G = sum over calibration tokens of x x^T, or its mean, shape (in, in), symmetric and
        positive semidefinite. Solutions do not depend on its scale.
    """

    weight: Array
    gram: Array


class Status(enum.IntEnum):
    """How a solver ended."""

    SPARSE = 0
    """The pattern holds and every entry is finite."""
    MAX_STEPS = 1
    """`ProximalGradient` ran out of steps, and blocks that were still dense were cut to their
    largest entries. ADMM always ends with a projection."""
    NONFINITE = 2
    """NaN or Inf appeared: the input holds it, or the damped Gram is not positive definite."""
    INDEFINITE = 3
    """The Gram is not positive semidefinite, by more than rounding: its diagonal or a loss is
    negative."""
    ASYMMETRIC = 4
    """The Gram is not symmetric, by more than rounding."""
    BROKEN = 5
    """The mask of the solver or of the refit keeps too many entries: a defect of its code."""

    @property
    def failed(self) -> bool:
        """Whether there is no solution."""
        return self >= Status.NONFINITE


class Candidate(NamedTuple):
    """The result of a solver, and the start of the refit.

    Attributes:
      weight: shape (out, in), zero outside the mask.
      mask: bool, shape (out, in), exactly N True in each block, or as many True as `Unstructured`
        keeps.
      damping: scalar, relative to the mean of the Gram's diagonal; the given one, or a raised one.
      dense_blocks: int32 scalar, number of blocks with more than N nonzeros when `ProximalGradient`
        ran out of steps.
      steps: int32 scalar, iterations taken.
      damping_raised: bool scalar, whether an inverse within the solver took more than `damping`.
      history: see `Solution`.
    """

    weight: Array
    mask: Array
    damping: Array
    dense_blocks: Array
    steps: Array
    damping_raised: Array
    history: Array

    @classmethod
    def of(
        cls,
        weight: Array,
        mask: Array,
        damping: Array,
        dense_blocks: Array | int = 0,
        steps: Array | int = 0,
        damping_raised: Array | bool = False,
        history: Array | None = None,
    ) -> "Candidate":
        """A candidate whose weight is cut to the mask."""
        return cls(
            jnp.where(mask, weight, 0),
            mask,
            damping,
            jnp.asarray(dense_blocks, jnp.int32),
            jnp.asarray(steps, jnp.int32),
            jnp.asarray(damping_raised),
            jnp.zeros(0, weight.dtype) if history is None else history,
        )


class Statistics(NamedTuple):
    """Figures about a solution. Losses are relative to tr(W0 G W0^T), with G as given, undamped.

    Attributes:
      relative_loss: loss of the returned weight.
      relative_loss_before_refit: loss of the solver's weight.
      steps: iterations of the solver.
      refit_steps: iterations of the refit.
      refit_exhausted: whether the refit took all its steps before it met its own stop test.
      dense_blocks: number of blocks cut to the pattern because `ProximalGradient` ran out of steps.
      dead_features: number of input features with only zeros in the calibration tokens.
      damping: number added to the diagonal of the Gram, in the units of the Gram.
      damping_raised: whether more damping was used than given, for the Gram or for an inverse
        within ADMM, which scales the features. See `prox24._solvers.damping`.
    """

    relative_loss: float
    relative_loss_before_refit: float
    steps: int
    refit_steps: int
    refit_exhausted: bool
    dense_blocks: int
    dead_features: int
    damping: float
    damping_raised: bool


class Solution(NamedTuple):
    """A sparse weight, its mask, its status and figures about it; a single one prints as one line.

    Attributes:
      weight: array of the shape and dtype of the given weight, exactly zero outside the mask.
      mask: bool, of the same shape, as in `Candidate`.
      status: a `Status`; if traced, an int32 scalar of its value.
      statistics: `Statistics`; if traced, of arrays.
      history: relative losses of the damped problem if the solver stopped after the first step, the
        second, and so on. The solver's `history` is the number of losses. Steps not taken have NaN.
    """

    weight: Array
    mask: Array
    status: Status
    statistics: Statistics
    history: Array

    def __str__(self) -> str:
        status: Any = self.status
        if is_traced(status) or jnp.ndim(status) > 0:
            return repr(self)
        figures = self.statistics
        return (
            f"{Status(self.status).name.lower()}: relative loss {figures.relative_loss:.4g} "
            f"({figures.relative_loss_before_refit:.4g} before the refit), {figures.steps} steps, "
            f"{figures.refit_steps} of the refit"
        )


class Normalized(NamedTuple):
    """A problem without units: W0 scaled to unit mean magnitude, and the Gram accordingly.

    Attributes:
      weight: W0 scaled, shape (out, in), float32 or float64.
      gram: shape (in, in).
      scale: shape (in,); a normalized weight divided by it is in the problem's units again.
    """

    weight: Array
    gram: Array
    scale: Array


class Refitted(NamedTuple):
    """The result of a refit.

    Attributes:
      weight: shape (out, in), of a normalized problem, zero outside the mask.
      mask: bool, shape (out, in).
      steps: int32 scalar, iterations taken.
      exhausted: bool, shape (out,), whether the steps ran out before the row met the refit's stop
        test.
    """

    weight: Array
    mask: Array
    steps: Array
    exhausted: Array


def check_arrays(weight: Array, gram: Array, axis: int | None = None) -> None:
    """Raises ValueError unless the arrays are floating-point and their shapes fit one another.

    The axis is the one that the weight sums over. None is for callers whose weights are (out, in).
    """
    remedy = f"pass axis={0 if axis in (-1, 1) else -1}"
    if axis is None:
        axis, remedy = -1, "transpose the weight to (out, in)"
    for name, array in {"weight": weight, "gram": gram}.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"the {name} is {array.dtype}, not floating-point")
    shapes = f"weight {weight.shape} and gram {gram.shape}"
    if weight.ndim != 2 or gram.ndim != 2 or not -2 <= axis < 2:
        raise ValueError(f"{shapes} are not matrices, or have no axis {axis}; use jax.vmap")
    width, other = weight.shape[axis], weight.shape[axis - 1]
    if gram.shape != (width, width):
        fits_other = gram.shape == (other, other)
        hint = f"; the Gram fits the other axis: {remedy}" if fits_other else ""
        raise ValueError(f"{shapes} do not fit: the weight sums over axis {axis}{hint}")
    if 0 in weight.shape:
        raise ValueError(f"weight {weight.shape} has no entries")


def normalize(
    weight: Array, gram: Array, curvature: Array | None = None, unit: int = 1
) -> Normalized:
    """Scales a problem with D = curvature^(1/2), and to a mean magnitude of 1 of the weight.

    W -> W D, G -> D^-1 G D^-1 does not change the loss. Dividing W by a scalar only multiplies the
    loss by a constant. The strength of a penalty then means the same in every layer. The default
    curvature is the diagonal of the Gram, which must already be damped. The magnitude of a unit of
    several entries is its norm.
    """
    deviation = jnp.sqrt(jnp.diagonal(gram) if curvature is None else curvature)
    magnitudes = jnp.abs(weight * deviation[None, :])
    if unit > 1:
        (magnitudes,) = unit_norms(split(magnitudes, Pattern(1, 1, unit)), unit)
    # The last bits of a mean depend on the order of its terms, and so on the number of devices that
    # share the rows. Those of a maximum do not. The ratio of both has no unit, and needs few bits.
    largest = jnp.max(magnitudes)
    ratio = lax.reduce_precision(jnp.mean(magnitudes) / largest, 8, 10)
    magnitude = ratio * largest
    scale = deviation / jnp.where(magnitude > 0, magnitude, 1)
    scaled = gram / (deviation[:, None] * deviation[None, :])
    return Normalized(weight * scale[None, :], scaled, scale)


def quadratic_loss(difference: Array, gram: Array) -> Array:
    """tr(D G D^T) for a difference D of shape (out, in), a scalar."""
    image = matmul(difference, gram)
    # The selection does not change the result. It keeps XLA's CPU backend from fusing the product
    # with the sum, which is three times slower than a product by itself.
    return jnp.sum(jnp.where(difference != 0, image, 0) * difference)


def relative_loss(weight: Array, problem: Normalized) -> Array:
    """The loss of a normalized weight (out, in), relative to the loss of zeros; a scalar."""
    loss = quadratic_loss(weight - problem.weight, problem.gram)
    return jnp.where(loss == 0, 0, loss / quadratic_loss(problem.weight, problem.gram))


ROUNDINGS = 100
"""Tolerated error of an entry of a Gram, in units of eps."""


def is_nonnegative(loss: Array, difference: Array, gram: Array, eps: float) -> Array:
    """Whether a loss is nonnegative except for rounding; a bool scalar.

    Let every entry G_ij have an error of at most c sqrt(G_ii G_jj). Then the loss of a row d is at
    least -c (sum_j |d_j| sqrt(G_jj))^2. Here c is 100 eps, with eps of the dtype of the sum that
    made the Gram.
    """
    deviation = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    most = jnp.sum(jnp.square(jnp.sum(jnp.abs(difference) * deviation[None, :], axis=1)))
    return loss >= -ROUNDINGS * eps * most


def is_symmetric(gram: Array, eps: float) -> Array:
    """Whether a Gram is symmetric except for rounding; a bool scalar, true if the Gram holds NaN.

    It compares G v with G^T v for one vector v of fixed signs, so that devices that share columns
    exchange only vectors. Let every entry G_ij have an error of at most c sqrt(G_ii G_jj), with c
    as in `is_nonnegative`. Then entry i of the difference is at most 2 c sqrt(G_ii)
    sum_j sqrt(G_jj).
    """
    # An additive sequence has no short period. With one, a shifted Gram could pass.
    phases = jnp.arange(gram.shape[0], dtype=gram.dtype) * 0.6180339887
    signs = jnp.where(phases % 1 < 0.5, 1, -1).astype(gram.dtype)
    rows = matmul(gram, signs)
    columns = matmul(signs, gram)
    deviation = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    most = 2 * ROUNDINGS * eps * deviation * jnp.sum(deviation)
    return ~jnp.any(jnp.abs(rows - columns) > most)


def has_negative_diagonal(gram: Array, eps: float) -> Array:
    """Whether a finite entry of the diagonal is negative beyond rounding; a bool scalar."""
    diagonal = jnp.diagonal(gram)
    return jnp.any(jnp.isfinite(diagonal) & (diagonal < -ROUNDINGS * eps * jnp.max(diagonal)))


DEFAULT_PULL = 1.0
"""The pull with the lowest perplexity of *Emma* in a measurement of several."""


def correct_inputs(
    weight: ArrayLike, gram: ArrayLike, cross: ArrayLike, pull: Array | float = DEFAULT_PULL
) -> Array:
    """The dense weight that also corrects the effect of pruning on the layer's inputs.

    The layer's input is x in the dense model, and x' in the pruned one. Let G = X' X'^T and
    C = X X'^T. The dense minimiser of

        |W X' - W0 X|^2 + pull tr(G) |W - W0|^2

    is W0 + W0 (C - G) (G + pull tr(G) I)^-1. Give it to `prox24.solve` as the weight, with the same
    Gram. Losses are then relative to it.

    Small pulls ruined models. The default corrects only directions whose eigenvalues are a large
    part of the trace (docs/theory.md, section 15).

    Args:
      weight: W0, shape (out, in).
      gram: G, shape (in, in), of the pruned model's inputs.
      cross: C, shape (in, in), on the scale of the Gram.
      pull: positive, traced or not, relative to the trace of G. If G + pull tr(G) I is not positive
        definite, the pull is raised like the damping of `prox24.solve`, but not above 1 / in.

    Returns:
      Array (out, in), float64 if the Gram is float64, else float32. It is NaN if the Gram or the
      cross-Gram holds NaN.

    Raises:
      ValueError: the pull is not positive and finite, or the shapes do not fit.

    Example:
      >>> x = jnp.eye(4)
      >>> correct_inputs(jnp.ones((1, 4)), x @ x.T, 1.5 * x, pull=0.25).tolist()
      [[1.25, 1.25, 1.25, 1.25]]
    """
    if not is_traced(pull) and not 0 < pull < math.inf:
        raise ValueError(f"a pull of {pull} is not positive and finite")
    weight, gram, cross = map(jnp.asarray, (weight, gram, cross))
    check_arrays(weight, gram)
    if cross.shape != gram.shape:
        raise ValueError(f"cross-Gram {cross.shape} is not of the Gram's shape {gram.shape}")
    return corrected_weight(weight, gram, cross, pull)


@jax.jit
def corrected_weight(weight: Array, gram: Array, cross: Array, pull: Array | float) -> Array:
    """The new dense weight of `correct_inputs`, compiled once for each shape.

    It treats explicit axes of a mesh like automatic ones.
    """
    program = _corrected
    if placed := explicit_sharding(weight, gram):
        program = auto_axes(program, out_sharding=placed)
    return program(weight, gram, cross, pull)


def _corrected(weight: Array, gram: Array, cross: Array, pull: Array | float) -> Array:
    dtype = working_dtype(gram.dtype)
    weight, gram = weight.astype(dtype), gram.astype(dtype)
    # Damping is relative to the mean of the diagonal.
    inverse = damped_inverse(gram, gram.shape[0] * jnp.asarray(pull, dtype)).matrix
    surplus = matmul(weight, cross.astype(dtype) - gram)
    return weight + matmul(surplus, inverse)
