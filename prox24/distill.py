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

from prox24 import partition, refine
from prox24.checkpoints.checkpoint import Checkpoint
from prox24.core.masks import top_mask
from prox24.core.precision import check_compute_dtype
from prox24.devices import AXIS, in_parts
from prox24.errors import CalibrationError, CheckpointError, Prox24Error
from prox24.forward import (
    Model,
    all_linears,
    check_widths,
    embed_windows,
    embedding_weights,
    head_weights,
    input_widths,
    layer_linears,
    layer_tensor,
    layer_weights,
    load_model,
    oriented,
    run_in_place,
)
from prox24.models import decoder, whole
from prox24.models.decoder import Config, Weights
from prox24.optax import proximal
from prox24.refine import Refined, Training
from prox24.refine.distillation import Features, Logits
from prox24.refine.training import Resume, check_positive, check_shares, share_of


@dataclasses.dataclass(frozen=True)
class MovingMask:
    """How a mask is found while a dense model is trained: by a proximal step after each of Adam.

    Attributes:
      first: lam of the first step.
      last: lam of the last step, to which it grows by the same factor in each.
      normalised: takes every linear in units of its mean magnitude, in which rate and lam then are.
      scaled: multiplies lam by the rate of the step, as proximal gradient descent does.
      alone: the result is the mask on the weights that were given; those that were trained to find
        it are not used.

    Raises:
      ValueError: `alone` and `normalised` both, in whose units the given weights are not; or lam is
        not positive.
    """

    first: float = 0.1
    last: float = 1e5
    normalised: bool = True
    scaled: bool = True
    alone: bool = False

    def __post_init__(self) -> None:
        if self.alone and self.normalised:
            raise ValueError("a mask alone is found in the units of the given weights")
        if not (self.first > 0 and self.last > 0):
            raise ValueError(f"lam from {self.first} to {self.last} is not positive")

    @classmethod
    def constant(cls, lam: float) -> "MovingMask":
        """As in ProxSparse: the same lam in every step, and of what is trained only the mask."""
        return cls(lam, lam, normalised=False, scaled=False, alone=True)


@dataclasses.dataclass(frozen=True)
class ModelRefinement:
    """How `distill` trains: Adam on gradients of norm 1 at the most.

    The rate rises along a line, from the n-th part of the highest in the first of n steps, and
    falls to zero along a cosine.

    Attributes:
      rate: the highest.
      passes: over the windows that are not held out.
      step_windows: the windows of a step.
      held_out: the share of the steps' windows, the last ones, that decides which weights were
        best; at least one step's are. Shuffle windows that are in the order of a text.
      cross_entropy: the share of the loss that is the text's own, see `prox24.refine.distill`.
      measurements: of the loss on what is held out, so many at the most, evenly over the steps.
      mask: None to train what is kept; else the mask is found as well, and every measurement is of
        the two largest of each block.
      warmup: the share of the steps in which the rate rises.
      micro_batches: in which the windows of a step are computed one after the other, for memory.
      compute_dtype: of the operands of products with the weights of the layers' linears and of the
        head, forwards and backwards, in both models: "float32", at the highest precision, or
        "bfloat16", whose products are summed in float32. All else is float32, but for the gradients
        of these weights, which are rounded to bfloat16 when devices have added them.

    Raises:
      Prox24Error: the micro-batches do not divide the windows of a step.
      ValueError: the rate, the passes, the measurements or the windows of a step are not positive,
        a share is not from 0 to 1, or it is another dtype.
    """

    rate: float = 2e-4
    passes: int = 1
    step_windows: int = 1
    held_out: float = 0.0625
    cross_entropy: float = 0.0
    measurements: int = 4
    mask: MovingMask | None = None
    warmup: float = 0.1
    micro_batches: int = 1
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_positive(self, "rate", "passes", "measurements", "step_windows")
        check_shares(self, "held_out", "cross_entropy", "warmup")
        check_compute_dtype(self.compute_dtype)
        if self.micro_batches < 1 or self.step_windows % self.micro_batches:
            raise Prox24Error(
                f"{self.micro_batches} micro-batches do not divide {self.step_windows} windows of "
                "a step"
            )

    @classmethod
    def proxsparse(cls, lam: float = 0.25, rate: float = 1e-4) -> "ModelRefinement":
        """What ProxSparse does to find a mask, with its numbers for Llama-2-7B.

        It is for 400 windows of 4,096 tokens, one of them for each step. Its AdamW has no weight
        decay, which is Adam. Other than there the rate falls along a cosine, not a line, embeddings
        and head are not trained, and a sixteenth of the windows is held out.

        References:
          "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for Pretrained LLMs",
          arXiv 2502.00258, and the scripts that its authors published.
        """
        return cls(rate, cross_entropy=1.0, mask=MovingMask.constant(lam))

    @property
    def micro_batch(self) -> int:
        """Windows that are in memory together."""
        return self.step_windows // self.micro_batches

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate by the number of steps before, of so many that the optimizer takes."""
        rising = min(round(self.warmup * steps), steps - 1)
        first = self.rate / max(1, rising)
        return optax.warmup_cosine_decay_schedule(first, self.rate, rising, steps)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Of so many steps; what finds a mask comes behind it."""
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(self.schedule(steps)))

    def held_out_of(self, groups: int) -> int:
        """Of the groups of windows that make a step each, those that are held out."""
        return share_of(self.held_out, groups)

    def steps(self, groups: int) -> int:
        """Of the optimizer."""
        return self.passes * (groups - self.held_out_of(groups))

    def measured_every(self, steps: int) -> int:
        """Steps from one measurement to the next."""
        return max(1, math.ceil(steps / self.measurements))


class Distilled(NamedTuple):
    """A pruned model after its training.

    Attributes:
      tensors: names and values, in the checkpoint's layout, of every tensor of every layer; where
        of a training only the mask is used, of every linear.
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
    the host: hidden width * 4 bytes for a token. With cross-entropy alone it does not run. The
    pruned model is in memory as a whole: its weights as they were given and the best ones, in
    float32 the trained ones, two moments of Adam and a gradient, and a byte for each entry, whether
    it is trained; embeddings and head besides. Where a mask is found in units of its own, all are
    float32, and no byte tells what is trained.

    Args:
      dense: the teacher.
      pruned: with the same config; its zeros stay zeros. Where its embeddings or head differ from
        the dense model's, each has its own.
      windows: tokens, shape (windows, length).
      refinement: see there.
      mesh: devices of one process, of which the first axis shares the windows of a micro-batch and
        the parts of every weight. A second axis, if there is one, shares heads and widths.
      resume: the state to begin with, given the one before the first step.
      on_measured: see `prox24.refine.distill`.

    Returns:
      A `Distilled`.

    Raises:
      CheckpointError: the models differ in more than their weights; the pruned one has no linear
        with a quarter of zeros, or with more of them than the dense one's; a mask is to be found
        and a linear's input width is not divisible by 4; or a mask alone is asked for and the
        weights that it is for are pruned already.
      CalibrationError: there are fewer than two steps' windows, all are held out, or the loss is
        not finite before the first step.
      Prox24Error: the devices of the first axis do not divide the windows of a micro-batch, those
        of the second the heads or the width of a layer.
    """
    mesh = None if mesh is None else partition.training_mesh(mesh)
    # Devices of the second axis would compute the same.
    teacher = load_model(dense, None if mesh is None else Mesh(mesh.devices[:, 0], (AXIS,)))
    student = load_model(pruned)
    config = student.config
    if config != teacher.config:
        raise CheckpointError(f"{pruned.path} and {dense.path} are not the same model")
    size, micro_batch, mask = refinement.step_windows, refinement.micro_batch, refinement.mask
    if mesh is not None:
        partition.check_divides(config, mesh, micro_batch)
    groups = len(windows) // size
    if mask is not None:
        check_widths(input_widths(all_linears(config)), (2, 4))
    held_out = refinement.held_out_of(groups)
    if groups < 2:
        raise CalibrationError(
            f"{len(windows)} windows are too few for steps of {size}: {2 * size} or more are "
            f"needed, {size} of them held out"
        )
    if groups == held_out:
        raise CalibrationError(f"all {len(windows)} windows are held out; use a smaller share")
    windows, steps = windows[: groups * size], refinement.steps(groups)
    params = _params(student, mesh)
    if mask is None and not (_is_pruned(config, params) or _has_more_zeros(pruned, dense, config)):
        raise CheckpointError(
            f"{pruned.path} has no more zeros in its linears than {dense.path}: prune it first"
        )
    if mask is not None and mask.alone and _is_pruned(config, params):
        raise CheckpointError(f"{pruned.path} is pruned: a mask alone is put on dense weights")
    dtype = refinement.compute_dtype
    outer = _outer(student, mesh, dtype)
    taught = refinement.cross_entropy < 1
    batches = list(windows.reshape(len(windows) // micro_batch, micro_batch, -1))
    if taught:
        targets = _targets(teacher, windows, micro_batch, dtype)
        of_teacher = _shared(_head(config, dtype, _placed(head_weights(teacher), mesh)), outer.head)
    else:  # Not looked at.
        targets, of_teacher = [np.zeros(0, np.float32)] * len(batches), outer.head
    if mask is not None and mask.normalised:
        outer = outer._replace(units=_mean_magnitudes(config, params))
        params = jax.tree.map(jnp.divide, params, outer.units)
    trained = refine.distill(
        *_functions(config, mesh, dtype),
        params,
        outer,
        batches,
        targets,
        _optimizer(config, refinement, steps),
        teacher=outer._replace(head=of_teacher),
        cross_entropy=refinement.cross_entropy,
        passes=refinement.passes,
        held_out=held_out * refinement.micro_batches,
        micro_batches=refinement.micro_batches,
        kept=functools.partial(_kept, config) if mask is None else None,
        project=None
        if mask is None
        else functools.partial(_two_largest, config, params if mask.alone else None),
        measured_every=refinement.measured_every(steps),
        resume=resume,
        on_measured=on_measured,
    )
    if not math.isfinite(trained.losses[0]):
        raise CalibrationError(f"{pruned.path}: the loss on the text is {trained.losses[0]}")
    tokens = trained.steps * size * windows.shape[1]
    found = trained.params
    if outer.units is not None:
        found = jax.tree.map(jnp.multiply, found, outer.units)
    tensors = _named(config, found)
    if mask is not None and mask.alone:
        linears = {linear.tensor for linear in all_linears(config)}
        tensors = ((name, values) for name, values in tensors if name in linears)
    return Distilled(tensors, trained, tokens)


def _params(model: Model, mesh: Mesh | None) -> whole.Stacked:
    """The tensors of all layers; on the host are those of one name at a time."""

    def stack(name: str, tensors: list[NDArray[Any]]) -> Array:
        values = np.stack(tensors)
        return jax.device_put(
            values, None if mesh is None else partition.stored(mesh, name, values.shape)
        )

    return whole.stacked(model.config, functools.partial(layer_tensor, model), stack)


class _Outer(NamedTuple):
    """What a training computes with besides the layers, and the units of their tensors."""

    embedding: Weights
    head: Weights
    units: whole.Stacked | None = None


def _outer(model: Model, mesh: Mesh | None, compute_dtype: str) -> _Outer:
    weights = _placed(embedding_weights(model) | head_weights(model), mesh)
    embedding = {name: weights[name] for name in decoder.embedding_shapes(model.config)}
    return _Outer(embedding, _head(model.config, compute_dtype, weights))


def _placed(weights: Weights, mesh: Mesh | None) -> Weights:
    if mesh is None:
        return weights
    return {name: jax.device_put(w, partition.outer(mesh, w.shape)) for name, w in weights.items()}


def _head(config: Config, compute_dtype: str, weights: Weights) -> Weights:
    """What is behind the layers, rounded once for all steps."""
    behind = {name: weights[name] for name in decoder.head_shapes(config)}
    return decoder.computed_in(compute_dtype, behind, {decoder.head_weight(config.head)})


def _shared(weights: Weights, others: Weights) -> Weights:
    """The weights, of which those that equal the others' are not in memory twice."""

    def shared(weight: Array, other: Array) -> Array:
        equal = weight.dtype == other.dtype and bool(jnp.all(weight == other))
        return other if equal else weight

    return jax.tree.map(shared, weights, others)


def _targets(
    model: Model, windows: NDArray[np.int32], size: int, compute_dtype: str
) -> list[NDArray[np.float32]]:
    """What the last layer puts out, by batch: shape (size, length, hidden)."""
    config, hidden = model.config, list(embed_windows(model, windows, size))
    for index in range(len(config.layers)):
        weights = decoder.computed_in(compute_dtype, layer_weights(model, index), _linears(config))
        run_in_place(model, index, weights, hidden)
    return hidden


@functools.lru_cache(maxsize=4)
def _functions(config: Config, mesh: Mesh | None, compute_dtype: str) -> tuple[Features, Logits]:
    """Objects that are the same for the same model, so that they are compiled once."""
    linears = _linears(config)

    def enter(layer: tuple[Weights, Weights | None], hidden: Array) -> tuple[Weights, Array]:
        weights, units = layer
        if units is not None:
            weights = jax.tree.map(jnp.multiply, weights, units)
        # In that dtype already when devices send them to each other.
        return partition.gathered(
            mesh, decoder.computed_in(compute_dtype, weights, linears), hidden
        )

    def features(params: whole.Stacked, outer: _Outer, tokens: Array) -> Array:
        units = [None] * len(params) if outer.units is None else outer.units
        layers = list(zip(params, units, strict=True))
        return whole.features(config, layers, outer.embedding, in_parts(tokens, mesh), enter)

    def logits(outer: _Outer, hidden: Array) -> Array:
        return decoder.logits(config, outer.head, hidden)

    return features, logits


@functools.lru_cache(maxsize=4)
def _optimizer(
    config: Config, refinement: ModelRefinement, steps: int
) -> optax.GradientTransformation:
    adam, rate, mask = refinement.optimizer(steps), refinement.schedule(steps), refinement.mask
    if mask is None:
        return adam
    growth = (mask.last / mask.first) ** (1 / max(1, steps - 1))
    lam = optax.exponential_decay(mask.first, 1, growth)

    def pruned(params: whole.Stacked) -> list[dict[str, bool]]:
        return [{name: name in _linears(config) for name in run} for run in params]

    step = proximal(lam, axis=-1, learning_rate=rate if mask.scaled else 1.0, mask=pruned)
    return optax.chain(adam, step)


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


def _has_more_zeros(pruned: Checkpoint, dense: Checkpoint, config: Config) -> bool:
    """Whether a linear has more than the same one of the dense model, which may have a few."""

    def zeros(checkpoint: Checkpoint, tensor: str) -> int:
        return int(np.count_nonzero(checkpoint.read(tensor) == 0))

    names = (linear.tensor for linear in all_linears(config))
    return any(zeros(pruned, name) > zeros(dense, name) for name in names)


def _is_pruned(config: Config, params: whole.Stacked) -> bool:
    """Whether a linear has so many zeros as no dense or quantised one has: a quarter."""
    linears = _linears(config)
    return any(
        bool(jnp.max(jnp.mean(leaf == 0, axis=(1, 2), dtype=jnp.float32)) >= 0.25)
        for run in params
        for name, leaf in run.items()
        if name in linears
    )


def _kept(config: Config, params: whole.Stacked) -> whole.Stacked:
    """The nonzeros of linears, and every entry of the other tensors."""
    return _of_linears(config, lambda w: w != 0, lambda other: jnp.array(True), params)


@functools.partial(jax.jit, static_argnums=0)
def _two_largest(
    config: Config, given: whole.Stacked | None, params: whole.Stacked
) -> whole.Stacked:
    """Linears with the two largest of each block; of what is given, where they are largest."""
    linears = _linears(config)

    def of_run(values: Weights, found: Weights) -> Weights:
        return {
            name: jnp.where(top_mask(jnp.abs(found[name])), w, 0) if name in linears else w
            for name, w in values.items()
        }

    return list(map(of_run, params if given is None else given, params))


def _mean_magnitudes(config: Config, params: whole.Stacked) -> whole.Stacked:
    """Of the linears of each layer, to be multiplied with; 1 for the other tensors."""
    return _of_linears(
        config,
        lambda w: _unit(jnp.mean(jnp.abs(w.astype(jnp.float32)), axis=(1, 2), keepdims=True)),
        lambda other: jnp.ones((len(other), *[1] * (other.ndim - 1)), jnp.float32),
        params,
    )


def _unit(size: Array) -> Array:
    return jnp.where(size > 0, size, 1)


def _named(config: Config, params: whole.Stacked) -> Iterator[tuple[str, NDArray[Any]]]:
    for index, weights in enumerate(whole.unstacked(config, params)):
        for name, values in weights.items():
            tensor = decoder.layer_tensor(config.names, index, name)
            yield tensor, np.asarray(oriented(config, values.astype(jnp.float32)))
