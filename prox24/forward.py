"""Running a checkpoint's layers one after the other over windows of tokens."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from prox24.checkpoints.checkpoint import Checkpoint
from prox24.devices import apart, everywhere, one_axis
from prox24.models import decoder
from prox24.models.decoder import Config, Layer
from prox24.models.families import config_from_hf

BATCH_TOKENS = 2048
"""Tokens of a micro-batch: enough to keep the matrix products busy, few enough for the memory."""


class Model(NamedTuple):
    """A checkpoint, the decoder that computes it, and the devices that share its windows."""

    checkpoint: Checkpoint
    config: Config
    mesh: Mesh | None = None


class Linear(NamedTuple):
    """A linear that is pruned.

    Attributes:
      tensor: the checkpoint's name of the weight.
      weight: its name among the weights of its layer.
      shape: (out, in).
      input: what `tap` calls its input.
    """

    tensor: str
    weight: str
    shape: tuple[int, ...]
    input: str


def load_model(checkpoint: Checkpoint, mesh: Mesh | None = None) -> Model:
    """Finds the decoder of a checkpoint; it runs on the devices of a mesh, or on one.

    Raises:
      UnsupportedModelError: the architecture, or a setting of it, has no forward pass here.
    """
    config = config_from_hf(checkpoint.config, checkpoint.tensors)
    return Model(checkpoint, config, one_axis(mesh))


def layer_linears(config: Config, index: int) -> list[Linear]:
    """The linears of a layer, in the order of pruning."""
    layer = config.layers[index]
    shapes = decoder.layer_shapes(layer)
    return [
        Linear(decoder.layer_tensor(config.names, index, weight), weight, shapes[weight], source)
        for weight, source in (
            (f"{name}.weight", source) for name, source in decoder.linear_inputs(layer).items()
        )
    ]


def all_linears(config: Config) -> list[Linear]:
    """The linears of every layer, in the order of pruning."""
    return [linear for i in range(len(config.layers)) for linear in layer_linears(config, i)]


def oriented(config: Config, weight: Array) -> Array:
    """A tensor of a layer from the checkpoint's layout to (out, in), or back."""
    return weight.T if config.names.transposed else weight


def layer_weights(model: Model, index: int) -> dict[str, Array]:
    """Reads the tensors of one layer, under the decoder's names, linears as (out, in)."""
    config, read = model.config, model.checkpoint.read
    weights = {
        name: oriented(config, jnp.asarray(read(decoder.layer_tensor(config.names, index, name))))
        for name in decoder.layer_shapes(config.layers[index])
    }
    return everywhere(weights, model.mesh)


def embedding_weights(model: Model) -> dict[str, Array]:
    """Reads what comes before the layers."""
    return _outer_weights(model, decoder.embedding_shapes(model.config))


def head_weights(model: Model) -> dict[str, Array]:
    """Reads what comes after the layers: the final norm and the head."""
    return _outer_weights(model, decoder.head_shapes(model.config))


def _outer_weights(model: Model, names: Iterable[str]) -> dict[str, Array]:
    tensors = {name: decoder.outer_tensor(model.config.names, name) for name in names}
    return {name: jnp.asarray(model.checkpoint.read(tensor)) for name, tensor in tensors.items()}


def batch_size(windows: int, length: int) -> int:
    """Windows per micro-batch: a divisor of their number, so that one shape is compiled."""
    largest = max(1, BATCH_TOKENS // length)
    return max(size for size in range(1, largest + 1) if windows % size == 0)


def embed_windows(model: Model, windows: NDArray[np.int32]) -> list[Array]:
    """Embeds windows (count, length): hidden states in micro-batches (batch, length, hidden).

    Raises:
      ValueError: the devices of the mesh do not divide the windows.
    """
    weights = embedding_weights(model)
    devices = 1 if model.mesh is None else model.mesh.size
    if len(windows) % devices:
        raise ValueError(f"{len(windows)} windows are not divisible by {devices} devices")
    size = devices * batch_size(len(windows) // devices, windows.shape[1])
    return [
        apart(decoder.embed(model.config, weights, jnp.asarray(windows[i : i + size])), model.mesh)
        for i in range(0, len(windows), size)
    ]


@functools.partial(jax.jit, static_argnums=0)
def run_layer(layer: Layer, weights: dict[str, Array], hidden: Array) -> Array:
    """One layer on one micro-batch, compiled once for all equal layers of a model."""
    return decoder.layer(layer, weights, hidden, decoder.no_tap)


def run_in_place(layer: Layer, weights: dict[str, Array], hidden: list[Array]) -> None:
    """Replaces every micro-batch by what the layer makes of it, so that few are there twice."""
    for i, batch in enumerate(hidden):
        hidden[i] = run_layer(layer, weights, batch)
