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
from prox24.core.masks import top_mask
from prox24.devices import apart, everywhere, in_parts
from prox24.errors import CalibrationError, CheckpointError
from prox24.forward import (
    Model,
    all_linears,
    check_widths,
    embed_windows,
    embedding_weights,
    head_weights,
    input_widths,
    layer_linears,
    layer_weights,
    load_model,
    oriented,
    run_in_place,
)
from prox24.models import decoder, whole
from prox24.models.decoder import Config, Weights
from prox24.optax import exponential, proximal
from prox24.refine import Refined, Training
from prox24.refine.distillation import Features, Logits
from prox24.refine.training import Resume


@dataclasses.dataclass(frozen=True)
class MovingMask:
    """How a mask is found while a dense model is trained: by a proximal step after each of Adam.

    Attributes:
      first: lam of the first step.
      last: lam of the last step, to which it grows by the same factor in each.
      normalised: takes every linear in units of its mean magnitude, in which rate and lam then are.
      scaled: multiplies lam by the rate of the step, as proximal gradient descent does.
    """

    first: float = 0.1
    last: float = 1e5
    normalised: bool = True
    scaled: bool = True

    @classmethod
    def constant(cls, lam: float) -> "MovingMask":
        """As in ProxSparse: the same lam in every step, whatever the rate and the weights.

        References:
          "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for Pretrained LLMs",
          arXiv 2502.00258.
        """
        return cls(lam, lam, normalised=False, scaled=False)


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
      mask: None to train what is kept; else the mask is found as well, and every measurement is of
        the two largest of each block.
    """

    rate: float = 2e-4
    passes: int = 1
    windows: int = 1
    held_out: float = 0.0625
    cross_entropy: float = 0.0
    measurements: int = 4
    mask: MovingMask | None = None

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
      pruned: with the same config; its zeros stay zeros. Where its embeddings or head differ from
        the dense model's, each has its own.
      windows: tokens, shape (windows, length).
      refinement: see there.
      mesh: devices that share the windows of a step and the parts of every weight.
      resume: the state to begin with, given the one before the first step.
      on_measured: see `prox24.refine.distill`.

    Returns:
      A `Distilled`.

    Raises:
      CheckpointError: the models differ in more than their weights, no linear of the pruned one has
        a zero, or a mask is to be found and a linear's input width is not divisible by 4.
      CalibrationError: there are fewer than two steps' windows, or the loss is not finite before
        the first step.
    """
    teacher, student = load_model(dense, mesh), load_model(pruned, mesh)
    config = student.config
    if config != teacher.config:
        raise CheckpointError(f"{pruned.path} and {dense.path} are not the same model")
    size = refinement.windows
    batches, mask = len(windows) // size, refinement.mask
    if mask is not None:
        check_widths(input_widths(all_linears(config)), (2, 4))
    held_out = refinement.held_out_of(batches)
    if batches <= held_out:
        raise CalibrationError(
            f"{len(windows)} windows are too few for steps of {size} and as many held out"
        )
    windows = windows[: batches * size]
    params = _place(whole.stacked(config, _layers(student)), student.mesh)
    if mask is None and not _has_zeros(config, params):
        raise CheckpointError(f"{pruned.path} has no zeros to keep in its linears: prune it first")
    outer = everywhere(embedding_weights(student) | head_weights(student), student.mesh)
    units = None
    if mask is not None and mask.normalised:
        units = _mean_magnitudes(config, params)
        params = jax.tree.map(jnp.divide, params, units)
    trained = refine.distill(
        *_functions(config, student.mesh),
        params,
        (outer, units),
        list(windows.reshape(batches, size, -1)),
        _targets(teacher, windows, size),
        _optimizer(config, refinement, refinement.steps(batches)),
        teacher=(_shared(everywhere(head_weights(teacher), teacher.mesh), outer), None),
        cross_entropy=refinement.cross_entropy,
        passes=refinement.passes,
        held_out=held_out,
        kept=functools.partial(_kept, config),
        project=None if mask is None else functools.partial(_two_largest, config),
        measured_every=math.ceil(refinement.steps(batches) / refinement.measurements),
        resume=resume,
        on_measured=on_measured,
    )
    if not math.isfinite(trained.losses[0]):
        raise CalibrationError(f"{pruned.path}: the loss on the text is {trained.losses[0]}")
    tokens = trained.steps * size * windows.shape[1]
    found = trained.params if units is None else jax.tree.map(jnp.multiply, trained.params, units)
    return Distilled(_named(config, found), trained, tokens)


def _layers(model: Model) -> list[Weights]:
    return [layer_weights(model, index) for index in range(len(model.config.layers))]


def _shared(weights: Weights, others: Weights) -> Weights:
    """The weights, of which those that equal the others' are not in memory twice."""

    def equal(a: Array, b: Array) -> bool:
        return a.dtype == b.dtype and bool(jnp.all(a == b))

    return {name: others[name] if equal(w, others[name]) else w for name, w in weights.items()}


def _targets(model: Model, windows: NDArray[np.int32], size: int) -> list[NDArray[np.float32]]:
    """What the last layer puts out, by batch."""
    hidden = list(embed_windows(model, windows, size))
    for index in range(len(model.config.layers)):
        run_in_place(model, index, layer_weights(model, index), hidden)
    return hidden


_Outer = tuple[Weights, whole.Stacked | None]
"""What is before and behind the layers, and the units of their tensors."""


@functools.lru_cache(maxsize=4)
def _functions(config: Config, mesh: Mesh | None) -> tuple[Features, Logits]:
    """Objects that are the same for the same model, so that they are compiled once."""

    def features(params: whole.Stacked, outer: _Outer, tokens: Array) -> Array:
        weights, units = outer
        if units is not None:
            params = jax.tree.map(jnp.multiply, params, units)
        return whole.features(config, params, weights, in_parts(tokens, mesh))

    def logits(outer: _Outer, hidden: Array) -> Array:
        return decoder.logits(config, outer[0], hidden)

    return features, logits


@functools.lru_cache(maxsize=4)
def _optimizer(
    config: Config, refinement: ModelRefinement, steps: int
) -> optax.GradientTransformation:
    rate, mask = optax.cosine_decay_schedule(refinement.rate, steps), refinement.mask
    if mask is None:
        return optax.adam(rate)
    lam = exponential(mask.first, (mask.last / mask.first) ** (1 / max(1, steps - 1)))

    def pruned(params: whole.Stacked) -> list[dict[str, bool]]:
        return [{name: name in _linears(config) for name in run} for run in params]

    step = proximal(lam, axis=-1, learning_rate=rate if mask.scaled else 1.0, mask=pruned)
    return optax.chain(optax.adam(rate), step)


def _place(params: whole.Stacked, mesh: Mesh | None) -> whole.Stacked:
    """Each device has a part of every tensor, along its first axis after the layers."""
    return jax.tree.map(lambda leaf: apart(leaf, mesh, axis=1), params)


@functools.lru_cache(maxsize=4)
def _linears(config: Config) -> frozenset[str]:
    """The names of linears among the tensors of layers."""
    indices = range(len(config.layers))
    return frozenset(linear.weight for i in indices for linear in layer_linears(config, i))


def _of_linears(
    config: Config,
    of_linear: Callable[[Array], Array],
    of_other: Callable[[Array], Array],
    params: whole.Stacked,
) -> whole.Stacked:
    linears = _linears(config)
    return [
        {name: (of_linear if name in linears else of_other)(leaf) for name, leaf in run.items()}
        for run in params
    ]


def _has_zeros(config: Config, params: whole.Stacked) -> bool:
    linears = _linears(config)
    return any(
        bool(jnp.any(leaf == 0)) for run in params for name, leaf in run.items() if name in linears
    )


def _kept(config: Config, params: whole.Stacked) -> whole.Stacked:
    """The nonzeros of linears, and every entry of the other tensors."""
    return _of_linears(config, lambda w: w != 0, lambda other: jnp.array(True), params)


def _two_largest(config: Config, params: whole.Stacked) -> whole.Stacked:
    """Linears with the two largest of each block."""
    return _of_linears(
        config, lambda w: jnp.where(top_mask(jnp.abs(w)), w, 0), lambda other: other, params
    )


def _mean_magnitudes(config: Config, params: whole.Stacked) -> whole.Stacked:
    """Of the linears of each layer, to be multiplied with; 1 for the other tensors."""
    return _of_linears(
        config,
        lambda w: _unit(jnp.mean(jnp.abs(w.astype(jnp.float32)), axis=(1, 2), keepdims=True)),
        lambda other: jnp.ones((), jnp.float32),
        params,
    )


def _unit(size: Array) -> Array:
    return jnp.where(size > 0, size, 1)


def _named(config: Config, params: whole.Stacked) -> Iterator[tuple[str, NDArray[Any]]]:
    for index, weights in enumerate(whole.unstacked(config, params)):
        for name, values in weights.items():
            tensor = decoder.layer_tensor(config.names, index, name)
            yield tensor, np.asarray(oriented(config, values.astype(jnp.float32)))
