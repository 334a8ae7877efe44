"""What the linears of a decoder's layer see, and their Grams."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from prox24.calibration.gram import Sums, add_in_turn, add_tokens, is_sent
from prox24.models import decoder
from prox24.models.decoder import Layer


def layer_inputs(layer: Layer, weights: dict[str, Array], hidden: Array) -> dict[str, Array]:
    """What the linears of a layer see, by the names that `tap` gives to inputs.

    Args:
      layer: which the weights are of.
      weights: the layer's tensors.
      hidden: shape (batch, length, hidden).

    Returns:
      Arrays (batch, length, in) for each input.
    """
    seen: dict[str, Array] = {}
    decoder.layer(layer, weights, hidden, seen.__setitem__)
    return seen


@functools.partial(
    jax.jit, static_argnames=("layer", "devices"), donate_argnames=("grams", "crosses")
)
def add_layer_inputs(
    layer: Layer,
    weights: dict[str, Array],
    hidden: Array,
    dense_hidden: Array | None,
    grams: Sums,
    crosses: Sums,
    devices: int | None = None,
) -> tuple[Sums, Sums]:
    """Runs one layer on a micro-batch and adds what its linears see to their Grams.

    Args:
      layer: static.
      weights: the layer's tensors.
      hidden: shape (batch, length, hidden), of the pruned model.
      dense_hidden: the same tokens in the dense model; None leaves the cross-Grams as they are.
      grams: sums of x' x'^T, by the names that `tap` gives to inputs; donated.
      crosses: sums of x x'^T, x' in the pruned and x in the dense model; donated. Where x is zero,
        as it is for a token that the dense model sends to other experts, x' takes its place.
      devices: how many share the columns of every sum; static. None where each has its own sum.

    Returns:
      The updated Grams and cross-Grams.
    """
    put = add_tokens if devices is None else functools.partial(add_in_turn, devices=devices)
    pruned = layer_inputs(layer, weights, hidden)
    grams = {name: put(grams[name], x, x) for name, x in pruned.items()}
    if dense_hidden is not None:
        dense = layer_inputs(layer, weights, dense_hidden)
        crosses = {
            # What only the pruned model sends to an expert has the expert's own output as target.
            name: put(crosses[name], jnp.where(is_sent(dense[name])[..., None], dense[name], x), x)
            for name, x in pruned.items()
        }
    return grams, crosses
