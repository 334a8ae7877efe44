"""All layers of a decoder as one differentiable function, equal neighbours compiled once."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from prox24.models import decoder
from prox24.models.decoder import Config, Weights

Stacked = list[Weights]
"""For each run of equal layers its tensors, shape (layers of the run, ...)."""


def stacked(config: Config, layers: Sequence[Weights]) -> Stacked:
    """Stacks the tensors of each run of equal layers."""
    return [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[index] for index in run))
        for run in _runs(config)
    ]


def unstacked(config: Config, weights: Stacked) -> Iterator[Weights]:
    """The tensors of each layer, one after the other."""
    for run, tensors in zip(_runs(config), weights, strict=True):
        for place in range(len(run)):
            yield {name: tensor[place] for name, tensor in tensors.items()}


def features(config: Config, weights: Stacked, outer: Weights, tokens: Array) -> Array:
    """What the last layer puts out, before the final norm.

    For the gradient only what enters each layer is kept, and the layer runs again.

    Args:
      config: static.
      weights: of the layers.
      outer: the tensors before the layers.
      tokens: ids, shape (batch, length).

    Returns:
      Hidden states (batch, length, hidden), float32.
    """
    hidden = decoder.embed(config, outer, tokens)
    for run, tensors in zip(_runs(config), weights, strict=True):
        spec = config.layers[run.start]

        @jax.checkpoint
        def step(hidden: Array, weights: Weights, spec: decoder.Layer = spec) -> tuple[Array, None]:
            return decoder.layer(spec, weights, hidden, decoder.no_tap), None

        hidden, _ = lax.scan(step, hidden, tensors)
    return hidden


@functools.lru_cache(maxsize=16)
def _runs(config: Config) -> tuple[range, ...]:
    """The indices of neighbours that are equal."""
    indices = range(len(config.layers))
    runs = (list(run) for _, run in itertools.groupby(indices, config.layers.__getitem__))
    return tuple(range(run[0], run[-1] + 1) for run in runs)
