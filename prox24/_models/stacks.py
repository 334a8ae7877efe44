"""All layers of a decoder as one differentiable function; equal neighbours are compiled once."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from jax import Array, lax

from prox24._models import decoder
from prox24._models.decoder import Weights
from prox24._models.spec import Config, Layer, layer_shapes

Tensor = TypeVar("Tensor")

Stacked = list[Weights]
"""For each run of equal layers, its tensors of shape (layers of the run, ...)."""


def stacked(
    config: Config,
    tensor: Callable[[int, str], Tensor],
    stack: Callable[[str, list[Tensor]], Array],
) -> Stacked:
    """Stacks the tensors of each run of equal layers, one name after the other.

    `tensor` takes the index of a layer and a name. `stack` takes a name and a list of tensors.
    """
    return [
        {
            name: stack(name, [tensor(index, name) for index in run])
            for name in layer_shapes(config.layers[run.start])
        }
        for run in _runs(config)
    ]


def unstacked(config: Config, weights: Stacked) -> Iterator[Weights]:
    """The tensors of each layer, one after the other."""
    for run, tensors in zip(_runs(config), weights, strict=True):
        for place in range(len(run)):
            yield {name: tensor[place] for name, tensor in tensors.items()}


def features(
    config: Config,
    layers: Sequence[Any],
    outer: Weights,
    tokens: Array,
    enter: Callable[[Any, Array], tuple[Weights, Array]] = lambda *given: given,
) -> Array:
    """The last layer's output (batch, length, hidden), float32, for ids (batch, length).

    The gradient keeps the outputs of linears, and computes the rest of a layer again. `layers` has
    a stacked pytree for each run, such as its weights. `enter` takes a layer's slice of the pytree
    and the layer's input. It returns the layer's weights and input.
    """
    hidden = decoder.embed(config, outer, tokens)
    for run, stack in zip(_runs(config), layers, strict=True):
        spec = config.layers[run.start]

        # Products with weights take most of the time, attention's scores most of the memory.
        @functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        )
        def step(hidden: Array, layer: Any, spec: Layer = spec) -> tuple[Array, None]:
            return decoder.layer(spec, *enter(layer, hidden), decoder.no_tap), None

        hidden, _ = lax.scan(step, hidden, stack)
    return hidden


@functools.lru_cache(maxsize=16)
def _runs(config: Config) -> tuple[range, ...]:
    """The index ranges of equal neighbours."""
    indices = range(len(config.layers))
    runs = (list(run) for _, run in itertools.groupby(indices, config.layers.__getitem__))
    return tuple(range(run[0], run[-1] + 1) for run in runs)
