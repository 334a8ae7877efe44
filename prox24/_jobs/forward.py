"""Runs a checkpoint's layers one after the other over windows of tokens."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from prox24._checkpoints.checkpoint import Checkpoint
from prox24._core.placement import (
    divisors,
    everywhere,
    in_parts,
    one_axis,
    own_windows,
    placed,
    taken,
)
from prox24._models import decoder, spec
from prox24._models.families import config_from_hf
from prox24._models.generate import ModelWeights
from prox24._models.spec import Config, Layer
from prox24.errors import CheckpointError
from prox24.packed import Packed24

BATCH_TOKENS = 2048
"""Tokens of a micro-batch: enough for fast matrix products, few enough for the memory."""

AnyArray = TypeVar("AnyArray", Array, NDArray[Any])

HiddenStates = NDArray[np.float32]
"""Hidden states of a micro-batch on the host, shape (windows, length, hidden).

A process has only its own windows.
"""

MicroBatches = list[HiddenStates] | HiddenStates
"""Hidden states of all micro-batches: a list in memory, or an array in a file."""


class Model(NamedTuple):
    """A checkpoint, its decoder, and the devices that share its windows."""

    checkpoint: Checkpoint
    config: Config
    mesh: Mesh | None = None


class Linear(NamedTuple):
    """A linear (out, in): its name in the checkpoint and in the decoder, and its input's name."""

    tensor: str
    weight: str
    shape: tuple[int, ...]
    input: str


def load_model(checkpoint: Checkpoint, mesh: Mesh | None = None) -> Model:
    """Finds the decoder of a checkpoint; it runs on the devices of a mesh, or on one."""
    # Opening has read the decoder. If there is none, this call raises the reason.
    config = checkpoint.decoder or config_from_hf(checkpoint.config, checkpoint.tensors)
    return Model(checkpoint, config, one_axis(mesh))


def layer_names(config: Config, index: int) -> dict[str, str]:
    """The checkpoint's names of a layer's tensors, by the decoder's."""
    shapes = spec.layer_shapes(config.layers[index])
    return {name: spec.layer_tensor(config.names, index, name) for name in shapes}


def outer_names(config: Config) -> dict[str, str]:
    """The checkpoint's names of the tensors outside the layers, by the decoder's."""
    shapes = spec.embedding_shapes(config) | spec.head_shapes(config)
    return {name: spec.outer_tensor(config.names, name) for name in shapes}


def layer_linears(config: Config, index: int) -> list[Linear]:
    """The linears of a layer, in the order of pruning."""
    layer, tensors = config.layers[index], layer_names(config, index)
    inputs = {f"{name}.weight": source for name, source in spec.linear_inputs(layer).items()}
    shapes = spec.layer_shapes(layer)
    return [Linear(tensors[name], name, shapes[name], source) for name, source in inputs.items()]


def all_linears(config: Config) -> list[Linear]:
    """The linears of every layer, in the order of pruning."""
    return [linear for i in range(len(config.layers)) for linear in layer_linears(config, i)]


def oriented(config: Config, weight: AnyArray) -> AnyArray:
    """Converts a tensor of a layer from the checkpoint's layout to (out, in), or back."""
    return weight.T if config.names.transposed else weight


def layer_tensor(model: Model, index: int, name: str) -> NDArray[Any]:
    """Reads a tensor of a layer by the decoder's name; a linear is (out, in)."""
    tensor = spec.layer_tensor(model.config.names, index, name)
    return oriented(model.config, model.checkpoint.read(tensor))


def layer_weights(model: Model, index: int) -> dict[str, Array]:
    """Reads the tensors of one layer, under the decoder's names, linears as (out, in)."""
    weights = {
        name: jnp.asarray(layer_tensor(model, index, name))
        for name in spec.layer_shapes(model.config.layers[index])
    }
    return everywhere(weights, model.mesh)


def embedding_weights(model: Model) -> dict[str, Array]:
    """Reads the tensors before the layers."""
    return _outer_weights(model, spec.embedding_shapes(model.config))


def head_weights(model: Model) -> dict[str, Array]:
    """Reads the tensors after the layers: the final norm and the head."""
    return _outer_weights(model, spec.head_shapes(model.config))


def _outer_weights(model: Model, names: Iterable[str]) -> dict[str, Array]:
    tensors = outer_names(model.config)
    return {name: jnp.asarray(model.checkpoint.read(tensors[name])) for name in names}


def all_weights(
    model: Model,
    dtype: np.dtype[Any] | None = None,
    *,
    pack_linear: Callable[[Array], Array | Packed24] | None = None,
) -> ModelWeights:
    """Reads every tensor of the computation, in `dtype`, or in the checkpoint's dtypes for None.

    `pack_linear`, such as `prox24.packed.pack`, packs the weight of each linear of a layer.
    """

    def cast(weights: dict[str, Array]) -> dict[str, Array]:
        return weights if dtype is None else jax.tree.map(lambda w: w.astype(dtype), weights)

    config = model.config
    layers: list[dict[str, Any]] = []
    for index in range(len(config.layers)):
        layers.append(dict(cast(layer_weights(model, index))))
        if pack_linear is None:
            continue
        for linear in layer_linears(config, index):
            try:
                layers[index][linear.weight] = pack_linear(layers[index][linear.weight])
            except ValueError as error:
                raise CheckpointError(f"tensor {linear.tensor}: {error}") from error
    return ModelWeights(cast(_outer_weights(model, outer_names(config))), layers)


def batch_size(windows: int, length: int, mesh: Mesh | None = None) -> int:
    """Windows of a micro-batch: a divisor of their number, so that one shape is compiled."""
    devices = 1 if mesh is None else mesh.size
    return devices * divisors(windows // devices, max(1, BATCH_TOKENS // length))[0]


def embed_windows(
    model: Model, windows: NDArray[np.int32], micro_batch: int | None = None
) -> Iterator[HiddenStates]:
    """Embeds windows (count, length), a micro-batch at a time.

    The table of token embeddings stays on the host. The device has only the rows of a micro-batch.
    """
    config, tokens = model.config, "embed_tokens.weight"
    table = model.checkpoint.read(outer_names(config)[tokens])
    others = _outer_weights(
        model, [name for name in spec.embedding_shapes(config) if name != tokens]
    )
    size = micro_batch or batch_size(len(windows), windows.shape[1], model.mesh)
    own = own_windows(size, model.mesh)
    for i in range(0, len(windows), size):
        ids = windows[i + own.start : i + own.stop]
        rows = others | {tokens: jnp.asarray(table[ids.ravel()])}
        places = jnp.arange(ids.size, dtype=jnp.int32).reshape(ids.shape)
        yield np.asarray(decoder.embed_program(config, rows, places))


@functools.partial(jax.jit, static_argnums=0)
def run_layer(layer: Layer, weights: dict[str, Array], hidden: Array) -> Array:
    """One layer on one micro-batch, compiled once for all equal layers of a model."""
    return decoder.layer(layer, weights, hidden, decoder.no_tap)


@functools.lru_cache
def layer_function(
    layer: Layer, mesh: Mesh | None, compute_dtype: str
) -> Callable[[dict[str, Array], Array], Array]:
    """A layer in training, compiled once for all equal layers; devices share the windows.

    See `prox24.refine.BlockRefinement` for `compute_dtype`.
    """
    linears = {f"{name}.weight" for name in spec.linear_inputs(layer)}

    def run(weights: dict[str, Array], hidden: Array) -> Array:
        used = decoder.computed_in(compute_dtype, weights, linears)
        return decoder.layer(layer, used, in_parts(hidden, mesh), decoder.no_tap)

    return run


def run_into(
    model: Model,
    index: int,
    weights: dict[str, Array],
    hidden: MicroBatches,
    results: MicroBatches,
) -> None:
    """Assigns the outputs of a layer to `results`, one micro-batch after the other.

    `results` may be `hidden`: then few micro-batches are in memory twice.
    """
    layer = model.config.layers[index]
    for i, batch in enumerate(hidden):
        results[i] = taken(run_layer(layer, weights, placed(batch, model.mesh)), model.mesh)
