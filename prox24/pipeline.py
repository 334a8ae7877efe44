"""Pruning a model layer after layer, each calibrated on the output of the pruned ones before it."""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from prox24.activations import ActivationFiles
from prox24.calibration.gram import Sums, add_layer_inputs, empty_gram, over_devices
from prox24.checkpoints.checkpoint import Checkpoint
from prox24.checkpoints.tensors import TensorSource
from prox24.core.masks import mean_sparsity
from prox24.core.pattern import PatternLike, Unstructured, as_pattern
from prox24.devices import apart, everywhere, own_windows, placed
from prox24.errors import CalibrationError, CheckpointError, SolverError
from prox24.forward import (
    HiddenStates,
    Linear,
    Model,
    all_linears,
    batch_size,
    embed_windows,
    layer_linears,
    layer_weights,
    load_model,
    oriented,
    run_in_place,
    run_into,
)
from prox24.solvers.problem import LayerProblem, Solution, Statistics, Status, correct_inputs
from prox24.solvers.solve import Refit, Solver, solve


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
    """

    name: str
    status: Status
    sparsity: float
    inputs: int
    tokens: int
    seconds: float
    statistics: Statistics


class PrunedLinear(NamedTuple):
    """The new values of a linear's weight, in float32 and the checkpoint's layout, and a report."""

    values: NDArray[Any]
    report: LinearReport


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
) -> Iterator[PrunedLinear]:
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
      dtype: what the weights will be written in, to which the layers after them see them rounded;
        None for each tensor's own.
      finished: weights that were pruned and written before, by name. They are run, and not yielded.
      micro_batch: windows that go through a layer together, a divisor of their number; None for
        about `forward.BATCH_TOKENS` tokens.
      activations: a folder for the hidden states, which are memory-mapped there, of each process
        another; None keeps them in memory. With what a run before has left there, layers whose
        linears are all finished are not run again.
      mesh: devices that share the windows and the rows of every weight; their number divides the
        windows. Its axes, of either kind, count as one. Where they are those of several processes,
        process after process, each of these calls `prune` with the same arguments and gets all
        linears. None for one device.

    Yields:
      Each linear, when it is solved. Of what was yielded nothing is kept.

    Raises:
      CheckpointError: a linear's input width is not divisible by M.
      CalibrationError: activations are not finite; names the layer.
      SolverError: a solution is not finite; names the tensor.
      ValueError: the solver does not support the pattern, or the mesh does not divide the windows.
    """
    model = load_model(checkpoint, mesh)
    widths = {linear.tensor: linear.shape[1] for linear in all_linears(model.config)}
    check_widths(widths, pattern)
    streams = ["pruned"] if pull is None else ["pruned", "dense"]
    size = micro_batch or batch_size(len(windows), windows.shape[1], model.mesh)
    files = None
    if activations is not None:
        own = len(own_windows(size, model.mesh))
        shape = (len(windows) // size * own, windows.shape[1], model.config.hidden)
        files = ActivationFiles(activations, shape, own)
    first, hidden = _enter(model, windows, size, streams, files)
    for index in range(first, len(model.config.layers)):
        dense = layer_weights(model, index)
        weights = dict(dense)
        yield from _prune_linears(
            model,
            index,
            dense,
            weights,
            hidden,
            functools.partial(solve, solver=solver, refit=refit, pattern=pattern, damping=damping),
            pull,
            dtype,
            finished,
        )
        for stream, used in zip(streams, (weights, dense), strict=False):
            if files is None:
                run_in_place(model, index, used, hidden[stream])
            else:
                results = files.micro_batches(stream, index + 1)
                run_into(model, index, used, hidden[stream], results)
                hidden[stream] = results
        if files is not None:
            files.complete(index + 1, streams)
        del dense, weights, used  # before the next ones are read


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
    finished: Mapping[str, TensorSource],
) -> Iterator[PrunedLinear]:
    """Prunes the linears of one layer, and puts what will be written into its weights."""
    remaining = []
    for linear in layer_linears(model.config, index):
        if linear.tensor in finished:
            written = oriented(model.config, jnp.asarray(finished[linear.tensor].read()))
            written = everywhere(written, model.mesh)
            weights[linear.weight] = written.astype(dense[linear.weight].dtype)
        else:
            remaining.append(linear)
    if not remaining:
        return
    sums = gather_grams(model, index, dense, hidden["pruned"], hidden.get("dense"))
    grams = {name: (gram.total, int(gram.tokens)) for name, gram in sums.grams.items()}
    crosses = {name: cross.total for name, cross in sums.crosses.items()}
    del sums  # with what compensates for rounding, which is as large
    for linear in remaining:
        began = time.perf_counter()
        given, (gram, tokens) = dense[linear.weight], grams[linear.input]
        problem = LayerProblem(apart(given.astype(jnp.float32), model.mesh), gram)
        if not tokens:
            eye = jnp.eye(linear.shape[1], dtype=jnp.float32)
            problem = problem._replace(gram=everywhere(eye, model.mesh))
        elif pull is not None:
            problem = correct_inputs(problem, crosses[linear.input], pull)
        solution = solve_problem(problem)
        pruned = everywhere(solution.weight, model.mesh)
        # What comes after sees the weight as it will be written.
        written = pruned.astype(given.dtype if dtype is None else dtype)
        weights[linear.weight] = written.astype(given.dtype)
        report = _report(linear, solution, tokens, time.perf_counter() - began)
        yield PrunedLinear(np.asarray(oriented(model.config, pruned)), report)


def collect(linears: Iterable[PrunedLinear]) -> PrunedModel:
    """Holds all that `prune` yields."""
    held = list(linears)
    return PrunedModel(
        {linear.report.name: linear.values for linear in held}, [linear.report for linear in held]
    )


def check_widths(widths: Mapping[str, int], pattern: PatternLike | Unstructured) -> None:
    """Raises CheckpointError where M does not divide an input width, given by tensor."""
    if isinstance(pattern, Unstructured):
        return
    pattern = as_pattern(pattern)
    for name, width in widths.items():
        if width % pattern.group:
            raise CheckpointError(
                f"tensor {name} has input width {width}, not divisible by {pattern.group}: "
                f"the pattern {pattern} does not fit"
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
) -> LayerSums:
    """What the linears of a layer see.

    Args:
      model: the model.
      index: of the layer.
      weights: the dense layer's tensors.
      hidden: micro-batches of what enters the layer in the pruned model.
      dense_hidden: the same in the dense model; without it there are no cross-Grams.

    Raises:
      CalibrationError: an input holds NaN or Inf; names it.
    """
    layer = model.config.layers[index]

    def empty() -> Sums:
        linears = layer_linears(model.config, index)
        widths = {linear.input: linear.shape[1] for linear in linears}
        return {name: empty_gram(width, model.mesh) for name, width in widths.items()}

    sums = LayerSums(empty(), {} if dense_hidden is None else empty())
    alongside = itertools.repeat(None, len(hidden)) if dense_hidden is None else dense_hidden
    for batch, dense_batch in zip(hidden, alongside, strict=True):
        both = [None if x is None else placed(x, model.mesh) for x in (batch, dense_batch)]
        sums = LayerSums(*add_layer_inputs(layer, dict(weights), *both, *sums))
    for each in sums:
        for name in list(each):
            # One after the other, so that few are there twice.
            each[name] = over_devices(each.pop(name), model.mesh)
    for name, gram in [*sums.grams.items(), *sums.crosses.items()]:
        if not jnp.isfinite(jnp.trace(gram.total)):
            raise CalibrationError(f"NaN or Inf in the activations {name} of layer {index}")
    return sums


def _report(linear: Linear, solution: Solution, tokens: int, seconds: float) -> LinearReport:
    if solution.status is Status.NONFINITE:
        raise SolverError(
            f"no finite solution for {linear.tensor}: its Gram is not positive definite; "
            "raise --damping"
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
