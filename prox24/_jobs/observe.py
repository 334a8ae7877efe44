"""The inputs of the linears of a decoder's layer, and their Grams."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from prox24._models import decoder
from prox24._models.spec import Layer
from prox24._pruning.grams import Sums, add_in_turn, add_tokens, is_sent


def layer_inputs(layer: Layer, weights: dict[str, Array], hidden: Array) -> dict[str, Array]:
    """The inputs of the linears of a layer, shape (batch, length, in), by the names of `tap`."""
    seen: dict[str, Array] = {}
    decoder.layer(layer, weights, hidden, seen.__setitem__)
    return seen


@functools.partial(
    jax.jit, static_argnames=("layer", "devices"), donate_argnames=("grams", "crosses")
)
def observe_layer(
    layer: Layer,
    weights: dict[str, Array],
    hidden: Array,
    dense_hidden: Array | None,
    grams: Sums,
    crosses: Sums,
    devices: int | None = None,
) -> tuple[Sums, Sums, Array | None]:
    """Runs one dense layer on a micro-batch and adds the inputs of its linears to their Grams.

    Inputs have the names of `tap`. Only the names in `grams` and `crosses` are summed. Let x' be an
    input in the pruned model, and x in the dense model. The Grams are sums of x' x'^T, and the
    cross-Grams are sums of x x'^T. If x is zero, as for a token routed to other experts, x' takes
    its place. If devices share the columns of every sum, `devices` is their number.

    Returns:
      The updated Grams and cross-Grams, and the layer's output for `dense_hidden`, or None.
    """
    put = add_tokens if devices is None else functools.partial(add_in_turn, devices=devices)
    pruned = layer_inputs(layer, weights, hidden)
    grams = {name: put(grams[name], pruned[name]) for name in grams}
    if dense_hidden is None:
        return grams, crosses, None
    dense: dict[str, Array] = {}
    output = decoder.layer(layer, weights, dense_hidden, dense.__setitem__)
    for name in crosses:
        x, given = pruned[name], dense[name]
        # For a token that only the pruned model routes here, the target is the expert's own output.
        target = jnp.where(is_sent(given)[..., None], given, x)
        crosses = crosses | {name: put(crosses[name], target, x)}
    return grams, crosses, output
