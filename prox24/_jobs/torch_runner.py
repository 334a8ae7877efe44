"""A PyTorch decoder, by torchax, as the loop prunes it."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from prox24._checkpoints.checkpoint import DTYPES, Checkpoint
from prox24._jobs.torchax import TorchLayer, TorchModel, layers_and_inputs
from prox24._pruning.recipe import Recipe
from prox24._pruning.runner import Inputs, Linear, Streams, TrainableStage
from prox24._trees.calibrate import Stream, gather
from prox24._trees.products import Apply
from prox24.errors import RecipeError


class Hidden(NamedTuple):
    """What enters a layer, batch by batch, in the pruned and in the dense model."""

    pruned: list[Array]
    dense: list[Array] | None
    crosses: bool


@dataclasses.dataclass
class TorchRunner:
    """Any HF decoder as a `prox24._pruning.runner.Runner`; see `torch_runner`.

    The decoder layers are transformers' own modules, each run as a function of JAX. They may depend
    on the hidden states, and otherwise only on what is the same for all windows: positions, masks.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    layers: list[TorchLayer]
    first_inputs: list[Array]
    mesh: None = None
    _latest: tuple[int, TorchModel] | None = None

    @property
    def stages(self) -> int:
        """Layers."""
        return len(self.layers)

    def linears(self, index: int) -> list[Linear]:
        """The linears of a layer; each has a Gram of its own."""
        layer = self.layers[index]
        shapes = {
            layer.prefix + name: tuple(values.shape)
            for name, values in layer.module.named_parameters()
        }
        return [Linear(name, name, shapes[name][axis]) for name, axis in layer.axes().items()]

    def tensors(self, index: int) -> list[str]:
        """The names of a layer's tensors."""
        layer = self.layers[index]
        return [layer.prefix + name for name, _ in layer.module.named_parameters()]

    def function(self, index: int) -> TorchModel:
        """A layer as a function, which is made once; only one layer's is kept."""
        if self._latest is None or self._latest[0] != index:
            self._latest = (index, self.layers[index].function())
        return self._latest[1]

    def weights(self, index: int) -> dict[str, Array]:
        """The parameters of a layer, float32."""
        return dict(self.function(index).params)

    def enter(self, streams: Streams) -> tuple[int, Hidden]:
        """The embedded windows."""
        hidden = self.first_inputs
        return 0, Hidden(hidden, hidden if streams.dense else None, streams.crosses)

    def observe(
        self, index: int, weights: Mapping[str, Array], state: Hidden, wanted: Collection[str]
    ) -> tuple[dict[str, list[Inputs]], Hidden]:
        """Runs the dense layer on each stream."""
        apply = self.function(index).apply
        inputs: dict[str, list[Inputs]] = {}
        if wanted:
            pruned = Stream(weights, state.pruned)
            dense = None if state.dense is None or not state.crosses else state.dense
            alongside = None if dense is None else Stream(weights, dense)
            grams = gather(apply, pruned, alongside, names=wanted).grams
            inputs = {name: grams[name].inputs() for name in wanted}
        if state.dense is not None:
            state = state._replace(dense=_run(apply, weights, state.dense))
        return inputs, state

    def advance(self, index: int, weights: Mapping[str, Array], state: Hidden) -> Hidden:
        """Runs the pruned layer."""
        apply = self.function(index).apply
        own = {name: weight.astype(jnp.float32) for name, weight in weights.items()}
        return state._replace(pruned=_run(apply, own, state.pruned))

    def dtype(self, tensor: str) -> np.dtype[Any]:
        """The recipe's, or the checkpoint's own."""
        dtype = self.recipe.dtype
        return self.checkpoint.tensors[tensor].dtype if dtype is None else DTYPES[dtype]

    def matrices(self, linear: Linear, weight: Array) -> list[Array]:
        """The weight as (out, in)."""
        layer = next(layer for layer in self.layers if linear.tensor.startswith(layer.prefix))
        return [weight if layer.axes()[linear.tensor] else weight.T]

    def joined(self, linear: Linear, matrices: list[Array]) -> Array:
        """The matrix in the module's layout."""
        return self.matrices(linear, *matrices)[0]

    def loaded(self, tensor: str, stored: NDArray[Any]) -> Array:
        """In the module's layout, as the file has it."""
        return jnp.asarray(stored)

    def stored(self, tensor: str, weight: Array) -> NDArray[Any]:
        """On the host."""
        return np.asarray(weight)

    def in_memory(self) -> Self:
        """Everything is in memory."""
        return self

    def trainable_stage(self, index: int, state: Hidden) -> TrainableStage:
        """Raises RecipeError: a module of PyTorch is not trained."""
        raise RecipeError("refine is for models with a forward pass of prox24's own")


def torch_runner(checkpoint: Checkpoint, windows: NDArray[np.int32], recipe: Recipe) -> TorchRunner:
    """Any HF decoder, as the loop prunes it.

    See `prox24._jobs.torchax.layers_and_inputs` for the arguments and what is raised.
    """
    return TorchRunner(checkpoint, recipe, *layers_and_inputs(checkpoint, windows))


def _run(apply: Apply, params: Mapping[str, Array], hidden: list[Array]) -> list[Array]:
    return list(map(functools.partial(jax.jit(apply), dict(params)), hidden))
