"""A `Runner` for a PyTorch decoder, by torchax."""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from prox24._checkpoints.checkpoint import Checkpoint
from prox24._jobs.torchax import layers_and_inputs
from prox24._pruning.runner import Inputs, Linear, Runner
from prox24._trees.calibrate import Stream, gather
from prox24._trees.products import Apply

Hidden = list[list[Array]]
"""The input of a layer, batch by batch, in the pruned model and, if it runs, the dense model."""


class TorchRunner(Runner[Hidden]):
    """Any HF decoder; its stages are its layers.

    A layer is a module of transformers, run as a function of JAX. It may depend on the hidden
    states. Its other inputs, such as positions and masks, must be equal for all windows.
    """

    def __init__(self, checkpoint: Checkpoint, windows: NDArray[np.int32]):
        self._checkpoint = checkpoint
        layers, self._first_inputs = layers_and_inputs(checkpoint, windows)
        self._layers = layers
        # The function of a layer is made once, and only the last one is kept.
        self._function = functools.lru_cache(maxsize=1)(lambda index: layers[index].function())

    @property
    def stages(self) -> int:
        return len(self._layers)

    def linears(self, index: int) -> list[Linear]:
        """The linears of a layer; each has its own Gram."""
        layer, shapes = self._layers[index], self._layers[index].shapes()
        return [Linear(name, name, shapes[name][axis]) for name, axis in layer.axes().items()]

    def weights(self, index: int) -> dict[str, Array]:
        """The parameters of a layer, float32."""
        return dict(self._function(index).params)

    def enter(self, dense: bool) -> tuple[int, Hidden]:
        return 0, [self._first_inputs] * (1 + dense)

    def observe(
        self, index: int, weights: Mapping[str, Array], state: Hidden, wanted: Collection[str]
    ) -> tuple[dict[str, list[Inputs]], Hidden]:
        """Runs the dense layer on each stream; two streams make cross-Grams."""
        apply, inputs = self._function(index).apply, dict[str, list[Inputs]]()
        if wanted:
            streams = (Stream(weights, hidden) for hidden in state)
            grams = gather(apply, *streams, names=wanted).grams
            inputs = {name: grams[name].inputs() for name in wanted}
        pruned, *dense = state
        return inputs, [pruned, *(_run(apply, weights, hidden) for hidden in dense)]

    def advance(self, index: int, weights: Mapping[str, Array], state: Hidden) -> Hidden:
        apply = self._function(index).apply
        own = {name: weight.astype(jnp.float32) for name, weight in weights.items()}
        pruned, *dense = state
        return [_run(apply, own, pruned), *dense]

    def dtype(self, tensor: str) -> np.dtype[Any]:
        return self._checkpoint.tensors[tensor].dtype

    def matrices(self, linear: Linear, weight: Array) -> list[Array]:
        layer = next(layer for layer in self._layers if linear.tensor.startswith(layer.prefix))
        return [weight if layer.axes()[linear.tensor] else weight.T]

    def joined(self, linear: Linear, matrices: list[Array]) -> Array:
        return self.matrices(linear, *matrices)[0]


def _run(apply: Apply, params: Mapping[str, Array], hidden: list[Array]) -> list[Array]:
    return list(map(functools.partial(jax.jit(apply), dict(params)), hidden))
