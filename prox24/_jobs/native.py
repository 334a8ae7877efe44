"""A `Runner` for a checkpoint whose decoder is prox24's own."""

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from prox24._checkpoints.checkpoint import Checkpoint
from prox24._core.placement import divisors, everywhere, own_windows, placed, taken
from prox24._jobs import forward
from prox24._jobs.activations import ActivationFiles
from prox24._jobs.forward import MicroBatches, Model
from prox24._jobs.observe import observe_layer
from prox24._models.heads import attention_ties
from prox24._pruning.grams import Sums, empty_columns, empty_gram, is_finite, over_devices
from prox24._pruning.recipe import Recipe
from prox24._pruning.runner import Inputs, Linear, Runner, Side, TrainableStage
from prox24.basis import Places
from prox24.errors import CalibrationError


class Hidden(NamedTuple):
    """The input of a layer: micro-batches of hidden states, in memory or in files.

    The output of a layer replaces them, one micro-batch after the other.
    """

    pruned: MicroBatches
    dense: MicroBatches | None
    files: ActivationFiles | None


@dataclasses.dataclass(frozen=True)
class NativeRunner(Runner[Hidden]):
    """A decoder; its stages are its layers. See `native_runner`."""

    model: Model
    windows: NDArray[np.int32]
    recipe: Recipe
    micro_batch: int
    step_batches: int = 1
    activations: Path | None = None
    shard_grams: bool = False

    @property
    def stages(self) -> int:
        return len(self.model.config.layers)

    @property
    def mesh(self) -> Mesh | None:
        return self.model.mesh

    def linears(self, index: int) -> list[Linear]:
        return [
            Linear(linear.tensor, linear.input, linear.shape[1])
            for linear in forward.layer_linears(self.model.config, index)
        ]

    def tensors(self, index: int) -> list[str]:
        return list(self._names(index).values())

    def ties(self, index: int) -> list[list[Side]]:
        """The groups of linears in attention that may be turned together."""
        config, names = self.model.config, self._names(index)
        linears = {linear.weight: linear for linear in forward.layer_linears(config, index)}

        def side(name: str, axis: int, places: Places) -> Side:
            linear, bias = linears[f"{name}.weight"], names.get(f"{name}.bias")
            return Side(linear.tensor, bias if axis == 0 else None, linear.input, axis, places)

        ties = attention_ties(config.layers[index].attention)
        return [[side(*each) for each in tie] for tie in ties]

    def weights(self, index: int) -> dict[str, Array]:
        """The tensors of a layer by the checkpoint's names; linears are (out, in)."""
        names = self._names(index)
        return {names[key]: w for key, w in forward.layer_weights(self.model, index).items()}

    def _names(self, index: int) -> dict[str, str]:
        return forward.layer_names(self.model.config, index)

    def _own(self, index: int, weights: Mapping[str, Array]) -> dict[str, Array]:
        return {key: weights[name] for key, name in self._names(index).items()}

    def enter(self, dense: bool) -> tuple[int, Hidden]:
        """Embeds the windows, or opens the hidden states of an earlier run on disk."""
        embedded = forward.embed_windows(self.model, self.windows, self.micro_batch)
        if self.activations is None:
            hidden = list(embedded)
            return 0, Hidden(hidden, list(hidden) if dense else None, None)
        own = len(own_windows(self.micro_batch, self.mesh))
        count, length = self.windows.shape
        shape = (count // self.micro_batch, own, length, self.model.config.hidden)
        names = ["pruned", "dense"] if dense else ["pruned"]
        files = ActivationFiles(self.activations, shape, names, self.stages)
        first = files.layer or 0
        entering = {name: files.micro_batches(name, first) for name in names}
        if files.layer is None:
            for i, states in enumerate(embedded):
                for batches in entering.values():
                    batches[i] = states
        return first, Hidden(entering["pruned"], entering.get("dense"), files)

    def observe(
        self, index: int, weights: Mapping[str, Array], state: Hidden, wanted: Collection[str]
    ) -> tuple[dict[str, list[Inputs]], Hidden]:
        """Runs the dense layer once on each stream, for Grams and the dense model's output."""
        layer, own = self.model.config.layers[index], self._own(index, weights)
        columns = self.mesh if self.shard_grams else None
        devices = None if columns is None else columns.size
        grams = self._empty(index, wanted)
        paired = state.dense is not None and self.recipe.targets is not None
        crosses = self._empty(index, wanted) if paired else {}
        outputs = state.dense
        if state.files is not None and state.dense is not None:
            outputs = state.files.micro_batches("dense", index + 1)
        alongside = itertools.repeat(None) if state.dense is None else state.dense
        for i, (batch, dense) in enumerate(zip(state.pruned, alongside, strict=False)):
            both = [None if x is None else placed(x, self.mesh) for x in (batch, dense)]
            grams, crosses, output = observe_layer(layer, own, *both, grams, crosses, devices)
            if outputs is not None and output is not None:
                outputs[i] = taken(output, self.mesh)
        if columns is None:
            for sums in (grams, crosses):
                for name in list(sums):
                    # One after the other, so that few Grams are in memory twice.
                    sums[name] = over_devices(sums.pop(name), self.mesh)
        for name, gram in [*grams.items(), *crosses.items()]:
            if not is_finite(gram.total):
                raise CalibrationError(f"NaN or Inf in the activations {name} of layer {index}")
        # The compensation of rounding errors is as large as the total. It is dropped.
        totals = {name: cross.total for name, cross in crosses.items()}
        inputs = {
            name: [Inputs(gram.total, int(gram.tokens), totals.get(name))]
            for name, gram in grams.items()
        }
        return inputs, state._replace(dense=outputs)

    def _empty(self, index: int, wanted: Collection[str]) -> Sums:
        linears = self.linears(index)
        widths = {linear.input: linear.width for linear in linears if linear.input in wanted}
        if self.shard_grams and self.mesh is not None:
            return {name: empty_columns(width, self.mesh) for name, width in widths.items()}
        return {name: empty_gram(width, self.mesh) for name, width in widths.items()}

    def advance(self, index: int, weights: Mapping[str, Array], state: Hidden) -> Hidden:
        """Runs the pruned layer, and notes on disk that the streams are complete."""
        own, files = self._own(index, weights), state.files
        results = state.pruned if files is None else files.micro_batches("pruned", index + 1)
        forward.run_into(self.model, index, own, state.pruned, results)
        if files is not None:
            files.complete(index + 1, ["pruned"] if state.dense is None else ["pruned", "dense"])
        return state._replace(pruned=results)

    def dtype(self, tensor: str) -> np.dtype[Any]:
        return self.model.checkpoint.tensors[tensor].dtype

    def loaded(self, tensor: str, stored: NDArray[Any]) -> Array:
        """The weight on every device, in the layout (out, in)."""
        weight = forward.oriented(self.model.config, jnp.asarray(stored))
        return everywhere(weight, self.mesh)

    def stored(self, tensor: str, weight: Array) -> NDArray[Any]:
        """The weight on the host, in the checkpoint's layout."""
        return np.asarray(forward.oriented(self.model.config, weight))

    def in_memory(self) -> Self:
        return dataclasses.replace(self, activations=None)

    def trainable_stage(self, index: int, state: Hidden) -> TrainableStage:
        assert state.dense is not None
        assert self.recipe.refine is not None
        layer, refine = self.model.config.layers[index], self.recipe.refine
        apply = forward.layer_function(layer, self.mesh, refine.compute_dtype)
        return TrainableStage(
            apply, self._names(index), list(state.pruned), list(state.dense), self.step_batches
        )


def native_runner(
    checkpoint: Checkpoint,
    windows: NDArray[np.int32],
    recipe: Recipe,
    *,
    micro_batch: int | None = None,
    activations: Path | None = None,
    mesh: Mesh | None = None,
    shard_grams: bool = False,
) -> NativeRunner:
    """A `Runner` for a checkpoint, calibrated on tokens of shape (windows, length).

    `micro_batch` divides the number of windows; None takes about `forward.BATCH_TOKENS` tokens.
    With a refinement it is the largest size, and a step has several micro-batches. Each process has
    its own folder of `activations`; None keeps hidden states in memory.

    All devices of the mesh share the windows and the rows of every weight. Their number divides
    windows and micro-batches. With `shard_grams` they share columns instead. They still share rows
    if their number does not divide a width.
    """
    model, refine = forward.load_model(checkpoint, mesh), recipe.refine
    count, length = windows.shape
    size = micro_batch or forward.batch_size(count, length, model.mesh)
    devices, step_batches = 1 if model.mesh is None else model.mesh.size, 1
    if refine is not None:
        step = refine.step_windows(count, length, devices)
        size = devices * divisors(step // devices, max(1, size // devices))[0]
        step_batches = step // size
    return NativeRunner(model, windows, recipe, size, step_batches, activations, shard_grams)
