"""Trains all kept weights of a pruned checkpoint together, on the dense model's predictions."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from prox24 import refine
from prox24._checkpoints.checkpoint import Checkpoint
from prox24._core.placement import AXIS, in_parts
from prox24._jobs import forward, partition
from prox24._models import decoder, spec, stacks
from prox24._models.decoder import Weights
from prox24._models.spec import Config
from prox24.errors import CalibrationError, CheckpointError
from prox24.refine import Refined, Training
from prox24.refine._distillation import Features, Logits
from prox24.refine._model import ModelRefinement
from prox24.refine._training import OnStep, Resume


def check_pair(dense: Checkpoint, pruned: Checkpoint) -> None:
    """Raises CheckpointError unless the second checkpoint is the first one, pruned."""
    of_dense, config = (forward.load_model(one).config for one in (dense, pruned))
    if config._replace(names=of_dense.names) != of_dense:
        raise CheckpointError(f"{pruned.path} and {dense.path} are not the same model")
    remedy = "prune it first"
    for own, other in zip(*map(forward.all_linears, (config, of_dense)), strict=True):
        zeros = np.mean(pruned.read(own.tensor) == 0)
        of_other = np.mean(dense.read(other.tensor) == 0)
        # Dense models have few zeros. Quantised ones have more, but fewer than a quarter.
        if zeros > of_other or zeros >= 0.25:
            return
        if zeros < of_other:
            remedy = "the dense model comes first"
    raise CheckpointError(
        f"{pruned.path} has no more zeros in its linears than {dense.path}: {remedy}"
    )


def held_out_groups(
    config: Config, windows: int, refinement: ModelRefinement, mesh: Mesh | None
) -> int:
    """The number of groups held out; raises CalibrationError if this leaves none to train on.

    Raises Prox24Error if the devices do not divide a micro-batch or the model.
    """
    if mesh is not None:
        partition.check_divides(config, mesh, refinement.micro_batch)
    size = refinement.step_windows
    groups = windows // size
    if groups < 2:
        raise CalibrationError(
            f"{windows} windows are too few for steps of {size}: {2 * size} or more are needed, "
            f"{size} of them held out"
        )
    held_out = refinement.held_out_of(groups)
    if groups == held_out:
        raise CalibrationError(f"all {windows} windows are held out; use a smaller share")
    return held_out


def train_checkpoint(
    dense: Checkpoint,
    pruned: Checkpoint,
    windows: NDArray[np.int32],
    refinement: ModelRefinement,
    *,
    mesh: Mesh | None = None,
    resume: Resume = lambda state: state,
    on_measured: Callable[[Training], None] = lambda state: None,
    on_step: OnStep | None = None,
) -> tuple[Refined, Iterator[tuple[str, NDArray[Any]]]]:
    """Trains the nonzeros of every linear, norms and biases; embeddings and head do not change.

    Call `check_pair` first.

    The dense model runs once, layer by layer. Its last hidden states stay on the host, with hidden
    width * 4 bytes for each token. With cross-entropy alone the dense model does not run.

    Memory holds several copies of the pruned model's layers. In the dtype of the checkpoint these
    are the given weights and the best weights. In float32 these are the trained weights, two
    moments of Adam and a gradient. A mask of the trained entries has one byte for each entry.
    Memory also holds embeddings and head, for both models if they differ.

    Devices along the first axis of the mesh share the windows of a micro-batch and the parts of
    every weight. Devices along the second axis share heads and widths.

    Returns:
      The outcome of the training, and an iterator over the name and values of every tensor of every
      layer, in the checkpoint's layout.
    """
    # The dense model uses the first axis only: devices along the second would repeat its work.
    teacher = forward.load_model(dense, None if mesh is None else Mesh(mesh.devices[:, 0], (AXIS,)))
    student = forward.load_model(pruned)
    config = student.config
    size, micro_batch = refinement.step_windows, refinement.micro_batch
    groups = len(windows) // size
    held_out = held_out_groups(config, len(windows), refinement, mesh)
    windows, steps = windows[: groups * size], refinement.steps(groups)
    params = _params(student, mesh)
    dtype = refinement.compute_dtype
    outer = _outer(student, mesh, dtype)
    taught = refinement.cross_entropy < 1
    batches = list(windows.reshape(len(windows) // micro_batch, micro_batch, -1))
    if taught:
        targets = _targets(teacher, windows, micro_batch, dtype)
        of_teacher = _shared(
            _head(config, dtype, _placed(forward.head_weights(teacher), mesh)), outer.head
        )
    else:  # The targets are not used.
        targets, of_teacher = [np.zeros(0, np.float32)] * len(batches), outer.head
    trained = refine.train_model(
        *_functions(config, mesh, dtype),
        params,
        outer,
        batches,
        targets,
        _optimizer(refinement, steps),
        teacher=outer._replace(head=of_teacher),
        cross_entropy=refinement.cross_entropy,
        passes=refinement.passes,
        held_out=held_out * refinement.micro_batches,
        micro_batches=refinement.micro_batches,
        trainable=functools.partial(_trainable, config),
        measured_every=refinement.measured_every(steps),
        resume=resume,
        on_measured=on_measured,
        on_step=on_step,
    )
    if not math.isfinite(trained.losses[0]):
        raise CalibrationError(f"{pruned.path}: the loss on the text is {trained.losses[0]}")
    return trained, _named(config, trained.params)


def _params(model: forward.Model, mesh: Mesh | None) -> stacks.Stacked:
    """The tensors of all layers; the host holds the tensors of one name at a time."""

    def stack(name: str, tensors: list[NDArray[Any]]) -> Array:
        values = np.stack(tensors)
        place = None if mesh is None else partition.stored(mesh, name, values.shape)
        return jax.device_put(values, place)

    return stacks.stacked(model.config, functools.partial(forward.layer_tensor, model), stack)


class _Outer(NamedTuple):
    """The tensors outside the layers."""

    embedding: Weights
    head: Weights


def _outer(model: forward.Model, mesh: Mesh | None, compute_dtype: str) -> _Outer:
    weights = _placed(forward.embedding_weights(model) | forward.head_weights(model), mesh)
    embedding = {name: weights[name] for name in spec.embedding_shapes(model.config)}
    return _Outer(embedding, _head(model.config, compute_dtype, weights))


def _placed(weights: Weights, mesh: Mesh | None) -> Weights:
    if mesh is None:
        return weights
    return {name: jax.device_put(w, partition.outer(mesh, w.shape)) for name, w in weights.items()}


def _head(config: Config, compute_dtype: str, weights: Weights) -> Weights:
    """The tensors after the layers, rounded once for all steps."""
    behind = {name: weights[name] for name in spec.head_shapes(config)}
    return decoder.computed_in(compute_dtype, behind, {spec.head_weight(config.head)})


def _shared(weights: Weights, others: Weights) -> Weights:
    """The weights; a weight that equals the other model's is in memory once."""

    def shared(weight: Array, other: Array) -> Array:
        equal = weight.dtype == other.dtype and bool(jnp.all(weight == other))
        return other if equal else weight

    return jax.tree.map(shared, weights, others)


def _targets(
    model: forward.Model, windows: NDArray[np.int32], size: int, compute_dtype: str
) -> list[NDArray[np.float32]]:
    """The output of the last layer, by batch: shape (size, length, hidden)."""
    config, hidden = model.config, list(forward.embed_windows(model, windows, size))
    for index in range(len(config.layers)):
        weights = decoder.computed_in(
            compute_dtype, forward.layer_weights(model, index), _linears(config)
        )
        forward.run_into(model, index, weights, hidden, hidden)
    return hidden


@functools.lru_cache(maxsize=4)
def _functions(config: Config, mesh: Mesh | None, compute_dtype: str) -> tuple[Features, Logits]:
    """The same function objects for equal arguments: they are compiled once."""
    linears = _linears(config)

    def enter(weights: Weights, hidden: Array) -> tuple[Weights, Array]:
        # Weights are rounded first, so that devices send them in the smaller dtype.
        return partition.gathered(
            mesh, decoder.computed_in(compute_dtype, weights, linears), hidden
        )

    def features(params: stacks.Stacked, outer: _Outer, tokens: Array) -> Array:
        return stacks.features(config, params, outer.embedding, in_parts(tokens, mesh), enter)

    def logits(outer: _Outer, hidden: Array) -> Array:
        return decoder.logits(config, outer.head, hidden)

    return features, logits


_optimizer = functools.lru_cache(maxsize=4)(ModelRefinement.optimizer)
"""The same optimizer object for equal arguments, so that it is compiled once."""


@functools.lru_cache(maxsize=4)
def _linears(config: Config) -> frozenset[str]:
    """The names of linears among the tensors of layers."""
    return frozenset(linear.weight for linear in forward.all_linears(config))


def _trainable(config: Config, params: stacks.Stacked) -> stacks.Stacked:
    """The nonzeros of linears, and every entry of the other tensors."""
    linears = _linears(config)
    return [
        {name: leaf != 0 if name in linears else jnp.array(True) for name, leaf in run.items()}
        for run in params
    ]


def _named(config: Config, params: stacks.Stacked) -> Iterator[tuple[str, NDArray[Any]]]:
    for index, weights in enumerate(stacks.unstacked(config, params)):
        for name, tensor in forward.layer_names(config, index).items():
            values = weights[name].astype(jnp.float32)
            yield tensor, np.asarray(forward.oriented(config, values))
