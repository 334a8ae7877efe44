"""Training all kept weights of a pruned checkpoint together, on what the dense one predicts."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from prox24 import refine
from prox24.checkpoints.checkpoint import Checkpoint
from prox24.devices import apart, everywhere, in_parts
from prox24.errors import CalibrationError, CheckpointError
from prox24.forward import (
    Model,
    embed_windows,
    embedding_weights,
    head_weights,
    layer_linears,
    layer_weights,
    load_model,
    oriented,
    run_in_place,
)
from prox24.models import decoder, whole
from prox24.models.decoder import Config, Weights
from prox24.refine import Refined, Training
from prox24.refine.distillation import Features, Logits
from prox24.refine.training import Resume


@dataclasses.dataclass(frozen=True)
class ModelRefinement:
    """How `distill` trains: Adam with a rate that falls to zero along a cosine.

    Attributes:
      rate: the first.
      passes: over the windows that are not held out.
      windows: of a step.
      held_out: the share of the steps' windows that decides which weights were best; at least one
        step's are.
      cross_entropy: the share of the loss that is the text's own, see `prox24.refine.distill`.
      measurements: of the loss on what is held out, evenly over the steps.
    """

    rate: float = 2e-4
    passes: int = 1
    windows: int = 1
    held_out: float = 0.0625
    cross_entropy: float = 0.0
    measurements: int = 4

    def held_out_of(self, batches: int) -> int:
        """Batches that are held out."""
        return max(1, round(self.held_out * batches))

    def steps(self, batches: int) -> int:
        """Of the optimizer."""
        return self.passes * (batches - self.held_out_of(batches))


class Distilled(NamedTuple):
    """A pruned model after its training.

    Attributes:
      tensors: names and values, in the checkpoint's layout, of every tensor of every layer.
      refined: how it went.
      tokens: of all windows that were trained on, counted once for each pass.
    """

    tensors: Iterator[tuple[str, NDArray[Any]]]
    refined: Refined
    tokens: int


def distill(
    dense: Checkpoint,
    pruned: Checkpoint,
    windows: NDArray[np.int32],
    refinement: ModelRefinement,
    *,
    mesh: Mesh | None = None,
    resume: Resume = lambda state: state,
    on_measured: Callable[[Training], None] = lambda state: None,
) -> Distilled:
    """Trains the nonzeros of every linear, norms and biases; embeddings and head stay.

    The dense model runs once, layer by layer, and the hidden states that it ends with are kept on
    the host: hidden width * 4 bytes for a token. The pruned model is in memory as a whole: float32
    weights, two moments of Adam, a gradient and the best weights.

    Args:
      dense: the teacher.
      pruned: with the same config; its zeros stay zeros.
      windows: tokens, shape (windows, length).
      refinement: see there.
      mesh: devices that share the windows of a step and the parts of every weight.
      resume: the state to begin with, given the one before the first step.
      on_measured: see `prox24.refine.distill`.

    Raises:
      CheckpointError: the models differ in more than their weights.
      CalibrationError: there are fewer than two steps' windows, or the loss is not finite before
        the first step.
    """
    teacher, student = load_model(dense, mesh), load_model(pruned, mesh)
    config = student.config
    if config != teacher.config:
        raise CheckpointError(f"{pruned.path} and {dense.path} are not the same model")
    size = refinement.windows
    batches = len(windows) // size
    held_out = refinement.held_out_of(batches)
    if batches <= held_out:
        raise CalibrationError(
            f"{len(windows)} windows are too few for steps of {size} and as many held out"
        )
    windows = windows[: batches * size]
    trained = refine.distill(
        *_functions(config, student.mesh),
        _place(whole.stacked(config, _layers(student)), student.mesh),
        everywhere(embedding_weights(student) | head_weights(student), student.mesh),
        list(windows.reshape(batches, size, -1)),
        _targets(teacher, windows, size),
        _adam(refinement.rate, refinement.steps(batches)),
        cross_entropy=refinement.cross_entropy,
        passes=refinement.passes,
        held_out=held_out,
        kept=functools.partial(_kept, config),
        measured_every=math.ceil(refinement.steps(batches) / refinement.measurements),
        resume=resume,
        on_measured=on_measured,
    )
    if not math.isfinite(trained.losses[0]):
        raise CalibrationError(f"{pruned.path}: the loss on the text is {trained.losses[0]}")
    tokens = trained.steps * size * windows.shape[1]
    return Distilled(_named(config, trained.params), trained, tokens)


def _layers(model: Model) -> list[Weights]:
    return [layer_weights(model, index) for index in range(len(model.config.layers))]


def _targets(model: Model, windows: NDArray[np.int32], size: int) -> list[NDArray[np.float32]]:
    """What the last layer puts out, by batch."""
    hidden = list(embed_windows(model, windows, size))
    for index in range(len(model.config.layers)):
        run_in_place(model, index, layer_weights(model, index), hidden)
    return hidden


@functools.lru_cache(maxsize=4)
def _functions(config: Config, mesh: Mesh | None) -> tuple[Features, Logits]:
    """Objects that are the same for the same model, so that they are compiled once."""

    def features(params: whole.Stacked, outer: Weights, tokens: Array) -> Array:
        return whole.features(config, params, outer, in_parts(tokens, mesh))

    def logits(outer: Weights, hidden: Array) -> Array:
        return decoder.logits(config, outer, hidden)

    return features, logits


@functools.lru_cache(maxsize=4)
def _adam(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def _place(params: whole.Stacked, mesh: Mesh | None) -> whole.Stacked:
    """Each device has a part of every tensor, along its first axis after the layers."""
    return jax.tree.map(lambda leaf: apart(leaf, mesh, axis=1), params)


def _kept(config: Config, params: whole.Stacked) -> whole.Stacked:
    """The nonzeros of linears, and every entry of the other tensors."""
    linears = {
        linear.weight
        for index in range(len(config.layers))
        for linear in layer_linears(config, index)
    }
    return [
        {name: values != 0 if name in linears else jnp.array(True) for name, values in run.items()}
        for run in params
    ]


def _named(config: Config, params: whole.Stacked) -> Iterator[tuple[str, NDArray[Any]]]:
    for index, weights in enumerate(whole.unstacked(config, params)):
        for name, values in weights.items():
            tensor = decoder.layer_tensor(config.names, index, name)
            yield tensor, np.asarray(oriented(config, values.astype(jnp.float32)))
