"""Running a checkpoint's layers one after the other over windows of tokens."""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from prox24.checkpoints.checkpoint import Checkpoint
from prox24.models.registry import family_of

BATCH_TOKENS = 2048
"""Tokens of a micro-batch: enough to keep the matrix products busy, few enough for the memory."""


class Model(NamedTuple):
    """A checkpoint with the pure functions that compute it.

    Attributes:
      checkpoint: gives the weights.
      family: module of `prox24.models`.
      config: the family's config, hashable.
    """

    checkpoint: Checkpoint
    family: ModuleType
    config: Any


def load_model(checkpoint: Checkpoint) -> Model:
    """Finds the family of a checkpoint and reads its config.

    Raises:
      UnsupportedModelError: no family computes it.
    """
    family = family_of(checkpoint.config)
    return Model(checkpoint, family, family.config_from_hf(checkpoint.config))


def layer_weights(model: Model, index: int) -> dict[str, Array]:
    """Reads the tensors of one layer, under their names without the layer's prefix."""
    prefix = model.family.layer_prefix(index)
    return {
        name.removeprefix(prefix): jnp.asarray(model.checkpoint.read(name))
        for name in model.family.tensor_shapes(model.config)
        if name.startswith(prefix)
    }


def outer_weights(model: Model) -> dict[str, Array]:
    """Reads the tensors outside the layers: embedding, final norm, head."""
    prefixes = tuple(model.family.layer_prefix(i) for i in range(model.config.layers))
    return {
        name: jnp.asarray(model.checkpoint.read(name))
        for name in model.family.tensor_shapes(model.config)
        if not name.startswith(prefixes)
    }


def batch_size(windows: int, length: int) -> int:
    """Windows per micro-batch: a divisor of their number, so that one shape is compiled."""
    largest = max(1, BATCH_TOKENS // length)
    return max(size for size in range(1, largest + 1) if windows % size == 0)


def embed_windows(model: Model, windows: NDArray[np.int32]) -> list[Array]:
    """Embeds windows (count, length): hidden states in micro-batches (batch, length, hidden)."""
    weights = outer_weights(model)
    size = batch_size(*windows.shape)
    return [
        model.family.embed(weights, jnp.asarray(windows[i : i + size]))
        for i in range(0, len(windows), size)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_layer(family: ModuleType, config: Any, weights: dict[str, Array], hidden: Array) -> Array:
    """One layer on one micro-batch, compiled once for all layers of a model."""
    return family.layer(config, weights, hidden, family.no_tap)
