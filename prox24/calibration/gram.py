"""Grams of the inputs of a layer's linears, accumulated over micro-batches."""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

PRECISION = "highest"


class GramSum(NamedTuple):
    """sum of x x^T over tokens, kept as a float32 sum and its rounding error (Kahan's method).

    Attributes:
      total: shape (in, in).
      error: shape (in, in), what `total` has in excess of the exact sum of the micro-batches.
    """

    total: Array
    error: Array


def empty_gram(width: int) -> GramSum:
    """The Gram of no tokens."""
    zeros = jnp.zeros((width, width), jnp.float32)
    return GramSum(zeros, zeros + 0)


def add_tokens(gram: GramSum, x: Array) -> GramSum:
    """Adds the tokens x of shape (..., in).

    The product runs in float32 at the highest precision; the default on accelerators, one bfloat16
    pass or TF32, has errors of 1e-3 and is not enough. Within a micro-batch the rounding error is
    that of a float32 product; across micro-batches it does not grow, thanks to the compensation.
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    product = jnp.matmul(x.T, x, precision=PRECISION) - gram.error
    total = gram.total + product
    return GramSum(total, (total - gram.total) - product)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="grams")
def add_layer_inputs(
    family: ModuleType,
    config: NamedTuple,
    weights: dict[str, Array],
    hidden: Array,
    grams: dict[str, GramSum],
) -> dict[str, GramSum]:
    """Runs one layer on a micro-batch and adds what its linears see to their Grams.

    Args:
      family: a module of `prox24.models`.
      config: the family's config.
      weights: the layer's tensors.
      hidden: shape (batch, length, hidden).
      grams: one `GramSum` per input name of the family's LINEAR_INPUTS; donated.

    Returns:
      The updated Grams.
    """
    updated: dict[str, GramSum] = {}

    def tap(name: str, x: Array) -> None:
        updated[name] = add_tokens(grams[name], x)

    family.layer(config, weights, hidden, tap)
    return updated
