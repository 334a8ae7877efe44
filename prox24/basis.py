"""Changes of basis between linears: the function stays, and a pattern costs less.

A hidden vector of width d is h = V x, and another linear computes y = O h. For every orthogonal R,
of shape (d, d), the matrices R^T V and O R compute the same y. Their N:M forms do not. R is learnt
so that the M - N smallest weights of each block matter little (docs/theory.md, section 16). In the
literature R is a rotation.

In attention a head's values are such a vector. So are its queries and keys, if nothing stands
between them and their product: (R^T q) (R^T k) = q k. There is an R for each head.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, auto_axes
from jax.typing import ArrayLike
from numpy.typing import NDArray

from prox24._core.masks import top_mask
from prox24._core.pattern import Pattern, PatternLike, as_pattern
from prox24._core.placement import explicit_sharding, replicated
from prox24._core.precision import einsum, working_dtype
from prox24._solvers.damping import damped_gram, damped_inverse
from prox24._solvers.problem import check_arrays, quadratic_loss

__all__ = ["Part", "learn", "objective", "orthogonal", "places_of", "turned"]

RATE = 0.08
"""Adam's learning rate at the first step. It falls to zero along a cosine."""

AnyArray = TypeVar("AnyArray", Array, NDArray[np.floating])

Places = NDArray[np.integer]
"""Rows or columns of a weight, shape (heads, members, d): the members of a head share its R."""


class Part(NamedTuple):
    """A linear on one side of the change.

    Attributes:
      weight: shape (out, in), floating.
      gram: the sum of x x^T over its inputs x, shape (in, in). Use the identity if every weight
        costs its square.
      axis: 0 if its outputs are turned, 1 if its inputs are.
      places: indices of the turned outputs or inputs, shape (heads, members, d). With axis 1 they
        are all inputs in order.
      pattern: N:M along the inputs, the pattern for pruning the linear.
    """

    weight: Array
    gram: Array
    axis: int
    places: Places
    pattern: PatternLike = Pattern(2, 4)


def places_of(heads: int, width: int, members: int = 1, start: int = 0) -> Places:
    """Consecutive places, sorted by head and then by member.

    Args:
      heads: the number of heads that have their own R, such as key-value heads.
      width: d, the width of a head.
      members: number of members that share the R of a head, such as the query heads of a key-value
        head.
      start: the first place.

    Returns:
      Integers, shape (heads, members, width).

    Example:
      >>> places_of(heads=2, width=4).tolist()
      [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    """
    return start + np.arange(heads * members * width).reshape(heads, members, width)


def turned(array: AnyArray, turn: AnyArray, places: Places, axis: int) -> AnyArray:
    """Turns one axis of an array: R^T V for axis 0, O R for axis 1, R^T b for a bias.

    A Gram is turned along both axes. NumPy turns its own arrays, also in float64. JAX turns its
    own, in true float32.

    Args:
      array: weight (out, in), Gram (in, in) or bias (out,).
      turn: R, shape (heads, d, d).
      places: indices of the turned entries of the axis, shape (heads, members, d).
      axis: 0 or 1.

    Returns:
      An array of the same shape, in the dtype of the turn.

    Raises:
      ValueError: the places are not distinct indices of the axis.

    Example:
      >>> swap = np.array([[[0.0, 1.0], [1.0, 0.0]]])
      >>> turned(np.array([[1.0, 2.0, 3.0]]), swap, places_of(1, 2), axis=1).tolist()
      [[2.0, 1.0, 3.0]]
    """
    _check_places(places, array.shape[axis])
    if isinstance(array, np.ndarray):
        moved = np.moveaxis(array, axis, -1).astype(turn.dtype)
        moved[..., places] = np.einsum("...hmi,hij->...hmj", moved[..., places], turn)
        return np.moveaxis(moved, -1, axis)
    program = functools.partial(_turned, axis=axis)
    if placed := explicit_sharding(array, array):
        program = auto_axes(program, out_sharding=placed)
    return program(array, turn, places)


def _turned(array: Array, turn: Array, places: Places, axis: int) -> Array:
    moved = jnp.moveaxis(array, axis, -1).astype(turn.dtype)
    new = einsum("...hmi,hij->...hmj", moved[..., places], turn)
    return jnp.moveaxis(moved.at[..., places].set(new), -1, axis)


def orthogonal(matrix: AnyArray) -> AnyArray:
    """The orthogonal factor of a QR decomposition whose other factor has a positive diagonal.

    Args:
      matrix: shape (..., d, d), float32 or float64, invertible; of NumPy or of JAX.

    Returns:
      Orthogonal matrices of the same shape, dtype and package; the identity for the identity.

    Example:
      >>> orthogonal(np.array([[3.0, 0.0], [0.0, -2.0]])).tolist() == [[1.0, 0.0], [0.0, -1.0]]
      True
    """
    xp: Any = np if isinstance(matrix, np.ndarray) else jnp
    q, r = xp.linalg.qr(matrix)
    negative = xp.diagonal(r, axis1=-2, axis2=-1) < 0
    return cast(AnyArray, xp.where(negative[..., None, :], -q, q))


def learn(
    parts: Sequence[Part],
    *,
    damping: ArrayLike = 0.01,
    exponent: ArrayLike = 0.5,
    steps: ArrayLike = 50,
) -> Array:
    """Learns an orthogonal R for each head, from the identity.

    It minimises, over all parts, the sum of w^2 s over the M - N smallest of each block of M,
    relative to tr(W G W^T). G is the damped Gram of the part's inputs, and is turned with them. A
    weight of column j costs s_j = G_jj (G_jj (G^-1)_jj)^-exponent. R starts as the identity. In
    each step Adam finds an antisymmetric S, and R is multiplied by the orthogonal factor of I + S.
    The rate falls from 0.08 to 0 along a cosine.

    Args:
      parts: the linears that make or read the same hidden vectors.
      damping: damping of the Grams, relative to the mean of their diagonals.
      exponent: how far the kept weights of a row correct the loss of a pruned weight: 0 not at all,
        1 as far as they can.
      steps: number of Adam's steps.

    Returns:
      R, shape (heads, d, d), float32 or float64 like the Grams. It is NaN if a Gram or a weight
      holds NaN.

    Raises:
      ValueError: shapes, places, dtypes or patterns do not fit. The message names the part.

    References:
      docs/theory.md, section 16. The place of R is that of R2 in "SpinQuant: LLM Quantization with
      Learned Rotations", arXiv 2405.16406; there it is learnt for quantisation.

    Example:
      >>> v, o = jnp.eye(8) + 0.1, jnp.eye(8) - 0.1
      >>> parts = [Part(v, jnp.eye(8), 0, places_of(1, 8)), Part(o, jnp.eye(8), 1, places_of(1, 8))]
      >>> turn = learn(parts, steps=10)
      >>> bool(objective(turn, parts) < objective(jnp.eye(8)[None], parts))
      True
    """
    return _learn(_prepared(parts, damping), exponent, steps)


def objective(
    turn: Array,
    parts: Sequence[Part],
    *,
    damping: ArrayLike = 0.01,
    exponent: ArrayLike = 0.5,
) -> Array:
    """The objective of `learn`.

    Args:
      turn: R, shape (heads, d, d), orthogonal.
      parts: see `learn`.
      damping: see `learn`.
      exponent: see `learn`.

    Returns:
      A scalar.

    Raises:
      ValueError: see `learn`. Also if the shape of the turn does not fit the parts.
    """
    prepared = _prepared(parts, damping)
    turn = jnp.asarray(turn, prepared[0].weight.dtype)
    heads, width, *_ = prepared[0].weight.shape
    if turn.shape != (heads, width, width):
        raise ValueError(f"turn {turn.shape} is not (heads, d, d): {(heads, width, width)}")
    return _objective(turn, prepared, exponent)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A part in the shape of its heads; a maker has axis 0, and a reader has axis 1.

    Attributes:
      weight: shape (heads, d, members, others). The others are inputs of a maker, or outputs of a
        reader.
      gram: for a maker, the diagonal of its damped Gram, shape (1, 1, 1, others). For a reader, the
        blocks of a head, shape (heads, members, d, d).
      inverse: the same parts of the inverse of the damped Gram.
      scale: 1 / tr(W G W^T).
      axis: static, see `Part`.
      pattern: static.
    """

    weight: Array
    gram: Array
    inverse: Array
    scale: Array
    axis: int = dataclasses.field(metadata={"static": True})
    pattern: Pattern = dataclasses.field(metadata={"static": True})


def _prepared(parts: Sequence[Part], damping: ArrayLike) -> list[_Prepared]:
    """Checks the parts, and converts them to the dtype of the computation."""
    if not parts:
        raise ValueError("there are no parts")
    checked = []
    for number, part in enumerate(parts):
        try:
            checked.append(_checked(part))
        except ValueError as error:
            raise ValueError(f"part {number}: {error}") from error
    shapes = sorted({np.shape(part.places)[::2] for part in checked})
    if len(shapes) > 1:
        raise ValueError(f"the parts differ in (heads, width): {shapes}")
    dtypes = sorted({str(part.weight.dtype) for part in checked})
    if len(dtypes) > 1:
        raise ValueError(f"the parts are computed in different dtypes: {dtypes}")
    damping = jnp.asarray(damping, checked[0].weight.dtype)
    return [_prepare(*part, damping) for part in checked]


def _checked(part: Part) -> Part:
    weight, gram = jnp.asarray(part.weight), jnp.asarray(part.gram)
    places, pattern = np.asarray(part.places), as_pattern(part.pattern)
    check_arrays(weight, gram)
    width, group = weight.shape[1], pattern.width
    if part.axis not in (0, 1):
        raise ValueError(f"axis {part.axis} is neither 0, for outputs, nor 1, for inputs")
    _check_places(places, weight.shape[part.axis])
    if width % group:
        raise ValueError(f"blocks of {group} do not divide the input width {width}")
    if part.axis == 1 and not np.array_equal(places.ravel(), np.arange(width)):
        raise ValueError(f"with axis=1, places are all of the {width} inputs in order")
    if part.axis == 1 and places.shape[-1] % group:
        raise ValueError(f"blocks of {group} do not divide a head of width {places.shape[-1]}")
    dtype = working_dtype(gram.dtype)
    return Part(weight.astype(dtype), gram.astype(dtype), part.axis, places, pattern)


def _check_places(places: Places, length: int) -> None:
    """Raises ValueError unless the places are different indices of an axis."""
    if places.ndim != 3 or not np.issubdtype(places.dtype, np.integer):
        raise ValueError(f"places {places.shape} {places.dtype} are not (heads, members, width)")
    if len(np.unique(places)) < places.size or not np.isin(places, np.arange(length)).all():
        raise ValueError(f"places are not {places.size} different ones of {length}")


@functools.partial(jax.jit, static_argnames=("axis", "pattern"))
def _prepare(
    weight: Array, gram: Array, axis: int, places: Array, pattern: Pattern, damping: Array
) -> _Prepared:
    """The part, copied to every device; explicit axes of a mesh are treated like automatic ones."""
    program = functools.partial(_in_heads, axis=axis, pattern=pattern)
    if placed := explicit_sharding(weight, gram):
        everywhere = NamedSharding(placed.mesh, PartitionSpec())
        program = auto_axes(program, out_sharding=everywhere)
    return program(weight, gram, places, damping)


def _in_heads(
    weight: Array, gram: Array, places: Array, damping: Array, axis: int, pattern: Pattern
) -> _Prepared:
    inverse, damping = damped_inverse(gram, damping)
    damped = damped_gram(gram, damping)
    heads = jnp.moveaxis(weight, axis, 0)[places.swapaxes(1, 2)]
    if axis == 0:
        whole = quadratic_loss(weight[places.ravel()], damped)
        damped, inverse = (jnp.diagonal(x)[None, None, None] for x in (damped, inverse))
    else:
        whole = quadratic_loss(weight, damped)
        at = places[..., :, None], places[..., None, :]
        damped, inverse = damped[at], inverse[at]
    scale = 1 / jnp.where(whole == 0, 1, whole)
    prepared = _Prepared(heads, damped, inverse, scale, axis, pattern)
    return jax.tree.map(replicated, prepared)


def _objective(turn: Array, parts: Sequence[_Prepared], exponent: ArrayLike) -> Array:
    def lost(part: _Prepared) -> Array:
        new = einsum("hij,himk->hjmk", turn, part.weight)
        gram, inverse = part.gram, part.inverse
        if part.axis == 1:
            gram, inverse = (
                einsum("hij,hmik,hkj->hjm", turn, blocks, turn)[..., None]
                for blocks in (gram, inverse)
            )
        # At least 1 by the Cauchy-Schwarz inequality, except for rounding.
        freedom = jnp.maximum(gram * inverse, 1)
        costs = jnp.square(new) * (gram * freedom ** -jnp.asarray(exponent, turn.dtype))
        # Blocks run along the inputs: the turned axis of a reader, and the last axis of a maker.
        inputs = 1 if part.axis == 1 else 3
        kept = top_mask(jnp.sqrt(lax.stop_gradient(costs)), part.pattern, axis=inputs)
        return part.scale * jnp.sum(jnp.where(kept, 0, costs))

    return sum(map(lost, parts), jnp.zeros((), turn.dtype))


@jax.jit
def _learn(parts: Sequence[_Prepared], exponent: ArrayLike, steps: ArrayLike) -> Array:
    first = parts[0].weight
    heads, width, *_ = first.shape
    identity = jnp.broadcast_to(jnp.eye(width, dtype=first.dtype), (heads, width, width))

    def rate(step: Array) -> Array:
        return RATE * (1 + jnp.cos(math.pi * (step / steps).astype(identity.dtype))) / 2

    optimizer = optax.adam(rate)
    gradient = jax.grad(lambda turn: _objective(turn, parts, exponent))

    def advance(_: Array, state: tuple[Array, optax.OptState]) -> tuple[Array, optax.OptState]:
        turn, moments = state
        slope = einsum("hji,hjk->hik", turn, gradient(turn))
        # Optax raises a float to an integer power, which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            angles, moments = optimizer.update((slope - slope.mT) / 2, moments)
        return einsum("hij,hjk->hik", turn, orthogonal(identity + angles)), moments

    turn, _ = lax.fori_loop(0, steps, advance, (identity, optimizer.init(identity)))
    return orthogonal(turn)  # The products round.
