"""Grams of tokens, accumulated over micro-batches."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from prox24._core.placement import apart, everywhere, parts, parts_or_copies, replicated
from prox24._core.precision import matmul


class GramSum(NamedTuple):
    """sum of x y^T over tokens, kept as a float32 sum and its rounding error.

    The two hold twice the digits of one. So almost no bit of the total depends on the order of the
    micro-batches, or on the number of devices. If devices share the tokens, a first axis holds
    their sums, until `over_devices` adds them. Or each device has some columns of the one sum, see
    `add_in_turn`.

    Attributes:
      total: shape (in, in), the sum to the nearest float32.
      error: shape (in, in), what `total` has in excess of the exact sum of the micro-batches.
      tokens: int32 scalar, the number of tokens y with a nonzero. An expert sees zeros for the
        tokens of other experts.
    """

    total: Array
    error: Array
    tokens: Array


Sums = dict[str, GramSum]


def empty_gram(width: int, mesh: Mesh | None = None, first: tuple[int, ...] = ()) -> GramSum:
    """Grams of no tokens, with more axes `first`; with a mesh instead one on each device."""
    first, sharding = (first, None) if mesh is None else ((mesh.size,), parts(mesh))

    def zeros(*shape: int, dtype: type = jnp.float32) -> Array:
        return jnp.zeros((*first, *shape), dtype, device=sharding)

    return GramSum(zeros(width, width), zeros(width, width), zeros(dtype=jnp.int32))


def empty_columns(width: int, mesh: Mesh) -> GramSum:
    """The Gram of no tokens, its columns cut among the devices; copies if they do not divide."""
    matrix = parts_or_copies(width, mesh, axis=1)
    total, error = (jnp.zeros((width, width), jnp.float32, device=matrix) for _ in range(2))
    return GramSum(total, error, everywhere(jnp.zeros((), jnp.int32), mesh))


@jax.jit
def is_finite(total: Array) -> Array:
    """Whether all traces of Grams (..., in, in) are finite. A token x adds |x|^2 to a trace."""
    return jnp.isfinite(jnp.trace(total, axis1=-2, axis2=-1)).all()


def add_tokens(gram: GramSum, x: Array, y: Array | None = None) -> GramSum:
    """Adds x y^T of the tokens x and y of shape (..., in), or x x^T.

    If each device has a Gram, its tokens are an equal share of the leading axes.

    A micro-batch has the rounding error of a float32 product. The compensation keeps the error of
    the sum from growing with the number of micro-batches.
    """
    # One device gets a first axis of length 1. XLA then computes the same product as for several.
    shape = (*(gram.tokens.shape or (1,)), -1, x.shape[-1])
    x = x.reshape(shape).astype(jnp.float32)
    if y is None:
        y, product = x, _with_itself(x)
    else:
        y = y.reshape(shape).astype(jnp.float32)
        product = matmul(x.mT, y)
    product = product.reshape(gram.total.shape)
    tokens = jnp.sum(is_sent(y), axis=-1, dtype=jnp.int32)
    return add(gram, GramSum(product, jnp.zeros_like(product), tokens.reshape(gram.tokens.shape)))


BLOCKS, NARROW = 4, 256
"""Rows of blocks of a product of x with itself, and the width below which one product is faster."""


def _with_itself(x: Array) -> Array:
    """x^T x of tokens (..., tokens, in); its blocks below the diagonal are copied from above."""
    width = x.shape[-1]
    blocks = BLOCKS if width % BLOCKS == 0 and width >= NARROW else 1
    columns, places = jnp.split(x, blocks, axis=-1), range(blocks)
    above = {(i, j): matmul(columns[i].mT, columns[j]) for i in places for j in places[i:]}
    return jnp.block([[above[i, j] if i <= j else above[j, i].mT for j in places] for i in places])


def is_sent(x: Array) -> Array:
    """Whether tokens (..., in) come to a linear: one that goes to other experts is zero."""
    return jnp.any(x != 0, axis=-1)


def add_in_turn(gram: GramSum, x: Array, y: Array | None = None, *, devices: int) -> GramSum:
    """`add_tokens` where devices share the columns of one sum, and the leading axis of the tokens.

    The tokens of one device after the other are sent to all; each adds them to its columns.
    """
    both = [
        tokens.reshape(devices, -1, tokens.shape[-1]) for tokens in (x, y) if tokens is not None
    ]
    places = jnp.arange(devices)[:, None, None]

    def add_part(place: Array, gram: GramSum) -> GramSum:
        # The sum of one part and zeros: so the device that has the part sends it to the others.
        sent = [
            replicated(jnp.sum(jnp.where(places == place, tokens, 0), axis=0)) for tokens in both
        ]
        # One whole product, not by blocks, since devices share the columns.
        return add_tokens(gram, sent[0], sent[-1])

    return lax.fori_loop(0, devices, add_part, gram)


def add(a: GramSum, b: GramSum) -> GramSum:
    """The Gram of the tokens of both: Knuth's sum, whose rounding error is known exactly."""
    total = a.total + b.total
    of_b = total - a.total
    missing = (a.total - (total - of_b)) + (b.total - of_b) - (a.error + b.error)
    nearest = total + missing
    return GramSum(nearest, (nearest - total) - missing, a.tokens + b.tokens)


def over_devices(gram: GramSum, mesh: Mesh | None) -> GramSum:
    """The Gram of the tokens of all devices, on each device.

    The devices exchange it only here. Each device adds some rows of all Grams in one order, and
    sends its sums to the others.
    """
    if mesh is None:
        return gram
    total, error, tokens = gram
    del gram  # An array is freed once its rows are sent.
    total = apart(total, mesh, 1)
    error = apart(error, mesh, 1)
    part = _add_parts(GramSum(total, error, tokens))
    del total, error
    return everywhere(part, mesh)


@jax.jit
def _add_parts(gram: GramSum) -> GramSum:
    return functools.reduce(add, map(GramSum, *gram))
