"""Pruning a model layer after layer, each calibrated on the output of the pruned ones before it."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from prox24.activations import ActivationFiles
from prox24.calibration.gram import (
    Sums,
    empty_columns,
    empty_gram,
    identity_if_unseen,
    over_devices,
)
from prox24.calibration.layer import add_layer_inputs
from prox24.checkpoints.checkpoint import Checkpoint
from prox24.checkpoints.tensors import TensorSource
from prox24.core.masks import mean_sparsity
from prox24.core.pattern import PatternLike, Unstructured
from prox24.devices import apart, everywhere, own_windows, placed
from prox24.errors import CalibrationError, CheckpointError, SolverError
from prox24.forward import (
    HiddenStates,
    Linear,
    Model,
    all_linears,
    batch_size,
    check_widths,
    embed_windows,
    input_widths,
    layer_function,
    layer_linears,
    layer_weights,
    load_model,
    micro_batches_of,
    oriented,
    run_in_place,
    run_into,
)
from prox24.models import decoder
from prox24.models.decoder import Config
from prox24.refine import BlockRefinement, Outcome, block
from prox24.solvers.problem import LayerProblem, Solution, Statistics, Status, correct_inputs
from prox24.solvers.solve import Refit, Solver, check_shares_columns, solve


class BlockReport(NamedTuple):
    """How a layer was refined.

    Attributes:
      outcome: how it ended.
      error_before: of the layer's output on held-out windows, see `prox24.refine.relative_error`.
      error: after.
      steps: of the optimizer.
      seconds: wall-clock time, compilation included.
    """

    outcome: Outcome
    error_before: float
    error: float
    steps: int
    seconds: float


class LinearReport(NamedTuple):
    """How one linear was pruned.

    Attributes:
      name: the tensor, by HF's name.
      status: how the solver ended.
      sparsity: fraction of exact zeros.
      inputs: its input width.
      tokens: calibration tokens that the linear saw; an expert sees those that are routed to it.
      seconds: wall-clock time of the solver and the refit, compilation included.
      statistics: the losses and what else `prox24.solve` says.
      block: how the layer was refined afterwards, or None.
    """

    name: str
    status: Status
    sparsity: float
    inputs: int
    tokens: int
    seconds: float
    statistics: Statistics
    block: BlockReport | None = None


class PrunedTensor(NamedTuple):
    """The new values of a tensor.

    Attributes:
      name: of the tensor, by HF's names.
      values: in float32 and the checkpoint's layout.
      report: of a linear; None for a norm or a bias that was refined with it.
    """

    name: str
    values: NDArray[Any]
    report: LinearReport | None


class PrunedModel(NamedTuple):
    """The new values of every pruned tensor, by name, in float32, and a report on each."""

    tensors: dict[str, NDArray[Any]]
    reports: list[LinearReport]


def prune(
    checkpoint: Checkpoint,
    windows: NDArray[np.int32],
    solver: Solver,
    refit: Refit | None,
    *,
    pattern: PatternLike | Unstructured = (2, 4),
    damping: float = 0.01,
    pull: float | None = None,
    dtype: np.dtype[Any] | None = None,
    finished: Mapping[str, TensorSource] = MappingProxyType({}),
    micro_batch: int | None = None,
    activations: Path | None = None,
    mesh: Mesh | None = None,
    shard_grams: bool = False,
    refinement: BlockRefinement | None = None,
) -> Iterator[PrunedTensor]:
    """Prunes every linear of every decoder layer; embedding, norms and head are left alone.

    For each layer the Grams of its linears are gathered with the layer still dense, from the
    activations that come out of the pruned layers before it; then each linear is solved, and the
    layer runs again, pruned, to feed the next. A linear that saw no token, as an expert may, is
    pruned as if its Gram were the identity; one that saw few has a singular Gram, which damping
    makes definite.

    Args:
      checkpoint: the model.
      windows: calibration tokens, shape (windows, length).
      solver: finds the masks, see `prox24.solve`.
      refit: updates the kept weights, or None.
      pattern: (N, M) along the input axis, or unstructured.
      damping: see `prox24.solve`.
      pull: None to reproduce each linear's own output on the pruned model's activations; a number
        to reproduce the dense model's, with that pull to the dense weight, see
        `prox24.correct_inputs`. It runs the dense model alongside.
      dtype: what the weights will be written in, to which the layers after them see what was
        pruned or trained rounded; None for each tensor's own.
      finished: weights that were pruned and written before, by name. They are run, and not yielded.
      micro_batch: windows that go through a layer together, a divisor of their number; None for
        about `forward.BATCH_TOKENS` tokens. With a refinement, the most of them: those of a step
        are a multiple.
      activations: a folder for the hidden states, which are memory-mapped there, of each process
        another; None keeps them in memory. With what a run before has left there, layers whose
        linears are all finished are not run again.
      mesh: devices that share the windows and the rows of every weight; their number divides the
        windows. Its axes, of either kind, count as one. Where they are those of several processes,
        process after process, each of these calls `prune` with the same arguments and gets all
        linears. None for one device.
      shard_grams: the devices of the mesh share the columns of Grams and weights, instead of the
        rows of weights with a copy of each Gram. This takes less memory and divides ADMM's inverses
        too, but the devices communicate in every step. For magnitude, Wanda and ADMM, with
        conjugate gradients or no refit. Devices that do not divide a linear's width share its rows.
      refinement: after its linears are pruned, trains the tensors of a layer together, zeros kept,
        to put out on the pruned model's activations what the dense layer puts out on the dense
        model's, which runs alongside, in one process. A layer then counts as finished when all
        that are trained are.

    Yields:
      Each linear, when it is solved; with a refinement what was trained of a layer, afterwards.
      Of what was yielded nothing is kept.

    Raises:
      CheckpointError: a linear's input width is not divisible by M, or a tensor overflows the
        dtype.
      CalibrationError: activations are not finite; names the layer. Or a refinement has too few
        windows.
      SolverError: a solution is not finite; names the tensor.
      ValueError: the solver does not support the pattern, or needs whole Grams where devices should
        share their columns; or the mesh or the micro-batches do not divide the windows.
    """
    if shard_grams:
        check_shares_columns(solver, refit)
    model = load_model(checkpoint, mesh)
    check_widths(input_widths(all_linears(model.config)), pattern)
    streams = ["pruned"] if pull is None and refinement is None else ["pruned", "dense"]
    count, length = windows.shape
    most, micro_batches = batch_size(count, length, model.mesh), 1
    size, devices = micro_batch or most, 1 if model.mesh is None else model.mesh.size
    if refinement is None and (count % size or size % devices):
        raise ValueError(
            f"micro-batches of {size} do not divide {count} windows among {devices} devices"
        )
    if refinement is not None:
        step = refinement.step_windows(count, length, devices)
        size = devices * micro_batches_of(step // devices, max(1, size // devices))[0]
        micro_batches = step // size
        if refinement.held_out_of(count // step) == count // step:
            raise CalibrationError(f"all {count} windows are held out; refine with a smaller share")
    files = None
    if activations is not None:
        own = len(own_windows(size, model.mesh))
        shape = (len(windows) // size * own, windows.shape[1], model.config.hidden)
        files = ActivationFiles(activations, shape, own, streams, len(model.config.layers))
    first, hidden = _enter(model, windows, size, streams, files)
    advance = functools.partial(_advance, model, files, hidden)
    solve_problem = functools.partial(
        solve, solver=solver, refit=refit, pattern=pattern, damping=damping
    )
    for index in range(first, len(model.config.layers)):
        dense = layer_weights(model, index)
        weights = dict(dense)
        done = _put_finished(model, index, weights, finished)
        trained = refined_tensors(model.config, index, refinement)
        refined = done.issuperset(trained)
        if not refined:
            weights, done = dict(dense), set()
        linears = _prune_linears(
            model, index, dense, weights, hidden, solve_problem, pull, dtype, done, shard_grams
        )
        if refined:
            yield from linears
        else:
            reports = {linear.name: linear.report for linear in linears}
        if "dense" in streams:
            advance("dense", index, dense)
        del dense  # before a training takes the memory
        if refinement is not None and not refined:
            outcome = _refine_layer(model, index, weights, hidden, refinement, micro_batches, dtype)
            for name, tensor in trained.items():
                report = reports.get(tensor)
                yield PrunedTensor(
                    tensor,
                    np.asarray(oriented(model.config, weights[name].astype(jnp.float32))),
                    None if report is None else report._replace(block=outcome),
                )
        advance("pruned", index, weights)
        if files is not None:
            files.complete(index + 1, streams)
        del weights, linears  # before the next ones are read


def _advance(
    model: Model,
    files: ActivationFiles | None,
    hidden: dict[str, list[HiddenStates]],
    stream: str,
    index: int,
    weights: dict[str, Array],
) -> None:
    """Replaces what enters a layer by what leaves it."""
    if files is None:
        run_in_place(model, index, weights, hidden[stream])
    else:
        results = files.micro_batches(stream, index + 1)
        run_into(model, index, weights, hidden[stream], results)
        hidden[stream] = results


def _put_finished(
    model: Model, index: int, weights: dict[str, Array], finished: Mapping[str, TensorSource]
) -> set[str]:
    """Puts what was written before into the weights of a layer; the names of what was."""
    done = set()
    for name in list(weights):
        tensor = decoder.layer_tensor(model.config.names, index, name)
        if tensor in finished:
            written = oriented(model.config, jnp.asarray(finished[tensor].read()))
            weights[name] = everywhere(written, model.mesh)
            done.add(name)
    return done


def refined_tensors(
    config: Config, index: int, refinement: BlockRefinement | None
) -> dict[str, str]:
    """The checkpoint's names of what a refinement trains of a layer, by the decoder's names."""
    if refinement is None:
        return {}
    linears = {linear.weight for linear in layer_linears(config, index)}
    return {
        name: decoder.layer_tensor(config.names, index, name)
        for name in decoder.layer_shapes(config.layers[index])
        if name in linears or not refinement.linears_only
    }


def _refine_layer(
    model: Model,
    index: int,
    weights: dict[str, Array],
    hidden: Mapping[str, list[HiddenStates]],
    refinement: BlockRefinement,
    micro_batches: int,
    dtype: np.dtype[Any] | None,
) -> BlockReport:
    """Trains the weights of a layer, in place, as they will be written.

    A step is made of so many micro-batches.
    """
    began = time.perf_counter()
    pruned = {linear.weight for linear in layer_linears(model.config, index)}
    if dtype is not None:
        trained = refined_tensors(model.config, index, refinement)
        weights |= {name: _rounded(trained[name], weights[name], dtype) for name in trained}
    groups = len(hidden["pruned"]) // micro_batches
    refined = block(
        layer_function(model.config.layers[index], model.mesh, refinement.compute_dtype),
        weights,
        hidden["pruned"],
        hidden["dense"],
        refinement.optimizer(groups),
        passes=refinement.passes,
        held_out=refinement.held_out_of(groups) * micro_batches,
        micro_batches=micro_batches,
        kept={
            name: values != 0 if name in pruned else not refinement.linears_only
            for name, values in weights.items()
        },
    )
    weights |= refined.params
    seconds = time.perf_counter() - began
    if not math.isfinite(refined.losses[0]):
        raise CalibrationError(f"NaN or Inf in what the pruned layer {index} puts out")
    best = min(loss for loss in refined.losses if math.isfinite(loss))
    return BlockReport(refined.outcome, refined.losses[0], best, refined.steps, seconds)


def _enter(
    model: Model,
    windows: NDArray[np.int32],
    micro_batch: int,
    streams: Sequence[str],
    files: ActivationFiles | None,
) -> tuple[int, dict[str, list[HiddenStates]]]:
    """The first layer to run, and what enters it, by stream."""
    if files is not None and files.layer is not None:
        return files.layer, {name: files.micro_batches(name, files.layer) for name in streams}
    embedded = embed_windows(model, windows, micro_batch)
    if files is None:
        hidden = list(embedded)
        return 0, {name: list(hidden) for name in streams}
    entering = {name: files.micro_batches(name, 0) for name in streams}
    for states, *places in zip(embedded, *entering.values(), strict=True):
        for place in places:
            place[...] = states
    return 0, entering


def _prune_linears(
    model: Model,
    index: int,
    dense: Mapping[str, Array],
    weights: dict[str, Array],
    hidden: Mapping[str, list[HiddenStates]],
    solve_problem: Callable[[LayerProblem], Solution],
    pull: float | None,
    dtype: np.dtype[Any] | None,
    done: Collection[str],
    shard_grams: bool,
) -> Iterator[PrunedTensor]:
    """Prunes the linears of one layer, and puts what will be written into its weights."""
    remaining = [
        linear for linear in layer_linears(model.config, index) if linear.weight not in done
    ]
    if not remaining:
        return
    alongside = None if pull is None else hidden["dense"]
    sums = gather_grams(model, index, dense, hidden["pruned"], alongside, shard_grams)
    grams = {name: (gram.total, int(gram.tokens)) for name, gram in sums.grams.items()}
    crosses = {name: cross.total for name, cross in sums.crosses.items()}
    del sums  # with what compensates for rounding, which is as large
    for linear in remaining:
        began = time.perf_counter()
        given, (gram, tokens) = dense[linear.weight], grams[linear.input]
        # Columns of the weight are where those of the Gram are, if these are not everywhere.
        axis = 0 if gram.sharding.is_fully_replicated else 1
        gram = identity_if_unseen(gram, tokens)
        problem = LayerProblem(apart(given.astype(jnp.float32), model.mesh, axis), gram)
        if tokens and pull is not None:
            problem = correct_inputs(problem, crosses[linear.input], pull)
        solution = solve_problem(problem)
        pruned = everywhere(solution.weight, model.mesh)
        # What comes after sees the weight as it will be written.
        report = _report(linear, solution, tokens, time.perf_counter() - began)
        weights[linear.weight] = _rounded(
            linear.tensor, pruned, given.dtype if dtype is None else dtype
        )
        values = np.asarray(oriented(model.config, pruned))
        yield PrunedTensor(linear.tensor, values, report)
        del problem, solution, pruned, values  # before the next linear needs their place


def _rounded(tensor: str, values: Array, dtype: np.dtype[Any]) -> Array:
    rounded = values.astype(dtype)
    if not jnp.isfinite(rounded).all():
        raise CheckpointError(f"tensor {tensor} overflows {dtype}; choose another dtype")
    return rounded


def collect(tensors: Iterable[PrunedTensor]) -> PrunedModel:
    """Holds all that `prune` yields."""
    held = list(tensors)
    return PrunedModel(
        {tensor.name: tensor.values for tensor in held},
        [tensor.report for tensor in held if tensor.report is not None],
    )


class LayerSums(NamedTuple):
    """The Grams and the cross-Grams of the inputs of a layer's linears, by input name."""

    grams: Sums
    crosses: Sums


def gather_grams(
    model: Model,
    index: int,
    weights: Mapping[str, Array],
    hidden: Sequence[HiddenStates],
    dense_hidden: Sequence[HiddenStates] | None = None,
    shard_grams: bool = False,
) -> LayerSums:
    """What the linears of a layer see.

    Args:
      model: the model.
      index: of the layer.
      weights: the dense layer's tensors.
      hidden: micro-batches of what enters the layer in the pruned model.
      dense_hidden: the same in the dense model; without it there are no cross-Grams.
      shard_grams: the model's devices share the columns of each, and do not have a copy each.

    Raises:
      CalibrationError: an input holds NaN or Inf; names it.
    """
    layer, mesh = model.config.layers[index], model.mesh
    columns = mesh if shard_grams else None
    devices = None if columns is None else columns.size

    def empty() -> Sums:
        linears = layer_linears(model.config, index)
        widths = {linear.input: linear.shape[1] for linear in linears}
        return {
            name: empty_gram(width, mesh) if columns is None else empty_columns(width, columns)
            for name, width in widths.items()
        }

    sums = LayerSums(empty(), {} if dense_hidden is None else empty())
    alongside = itertools.repeat(None, len(hidden)) if dense_hidden is None else dense_hidden
    for batch, dense_batch in zip(hidden, alongside, strict=True):
        both = [None if x is None else placed(x, mesh) for x in (batch, dense_batch)]
        sums = LayerSums(*add_layer_inputs(layer, dict(weights), *both, *sums, devices))
    if columns is None:
        for each in sums:
            for name in list(each):
                # One after the other, so that few are there twice.
                each[name] = over_devices(each.pop(name), mesh)
    for name, gram in [*sums.grams.items(), *sums.crosses.items()]:
        if not jnp.isfinite(jnp.trace(gram.total)):
            raise CalibrationError(f"NaN or Inf in the activations {name} of layer {index}")
    return sums


def _report(linear: Linear, solution: Solution, tokens: int, seconds: float) -> LinearReport:
    if solution.status is Status.INDEFINITE:
        raise SolverError(f"the Gram of {linear.tensor} is not positive semidefinite")
    if solution.status is Status.NONFINITE:
        raise SolverError(
            f"no finite solution for {linear.tensor}: its Gram is not positive definite with this "
            "--damping, or numbers are too large"
        )
    return LinearReport(
        name=linear.tensor,
        status=solution.status,
        sparsity=float(mean_sparsity(solution.weight)),
        inputs=linear.shape[1],
        tokens=tokens,
        seconds=seconds,
        statistics=solution.statistics,
    )
