"""Pruning a model layer after layer, each calibrated on the output of the pruned ones before it."""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from prox24.calibration.gram import Sums, add_layer_inputs, empty_gram, over_devices
from prox24.checkpoints.checkpoint import Checkpoint
from prox24.checkpoints.tensors import TensorSource
from prox24.core.masks import mean_sparsity
from prox24.core.pattern import PatternLike, Unstructured, as_pattern
from prox24.devices import apart, everywhere
from prox24.errors import CalibrationError, CheckpointError, SolverError
from prox24.forward import (
    Linear,
    Model,
    all_linears,
    embed_windows,
    layer_linears,
    layer_weights,
    load_model,
    oriented,
    run_in_place,
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
      mesh: devices, all of this process, that share the windows and the rows of every weight; their
        number divides the windows. Its axes, of either kind, count as one. None for one device.

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
    hidden = embed_windows(model, windows)
    dense_hidden = None if pull is None else list(hidden)
    for index in range(len(model.config.layers)):
        yield from _prune_layer(
            model,
            index,
            hidden,
            dense_hidden,
            solver,
            refit,
            pattern,
            damping,
            pull,
            dtype,
            finished,
        )


def _prune_layer(
    model: Model,
    index: int,
    hidden: list[Array],
    dense_hidden: list[Array] | None,
    solver: Solver,
    refit: Refit | None,
    pattern: PatternLike | Unstructured,
    damping: float,
    pull: float | None,
    dtype: np.dtype[Any] | None,
    finished: Mapping[str, TensorSource],
) -> Iterator[PrunedLinear]:
    """Prunes one layer and runs it; what it holds is gone before the next one is read."""
    layer, dense = model.config.layers[index], layer_weights(model, index)
    weights = dict(dense)
    remaining = []
    for linear in layer_linears(model.config, index):
        if linear.tensor in finished:
            written = oriented(model.config, jnp.asarray(finished[linear.tensor].read()))
            written = everywhere(written, model.mesh)
            weights[linear.weight] = written.astype(dense[linear.weight].dtype)
        else:
            remaining.append(linear)
    if remaining:
        sums = gather_grams(model, index, dense, hidden, dense_hidden)
    for linear in remaining:
        began = time.perf_counter()
        given, gram = dense[linear.weight], sums.grams[linear.input]
        problem = LayerProblem(apart(given.astype(jnp.float32), model.mesh), gram.total)
        tokens = int(gram.tokens)
        if not tokens:
            problem = problem._replace(gram=jnp.eye(linear.shape[1], dtype=jnp.float32))
        elif pull is not None:
            problem = correct_inputs(problem, sums.crosses[linear.input].total, pull)
        solution = solve(problem, solver, refit, pattern=pattern, damping=damping)
        # What comes after sees the weight as it will be written.
        written = solution.weight.astype(given.dtype if dtype is None else dtype)
        weights[linear.weight] = everywhere(written.astype(given.dtype), model.mesh)
        report = _report(linear, solution, tokens, time.perf_counter() - began)
        yield PrunedLinear(np.asarray(oriented(model.config, solution.weight)), report)
    run_in_place(layer, weights, hidden)
    if dense_hidden is not None:
        run_in_place(layer, dense, dense_hidden)


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
    weights: dict[str, Array],
    hidden: list[Array],
    dense_hidden: list[Array] | None = None,
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
        sums = LayerSums(*add_layer_inputs(layer, weights, batch, dense_batch, *sums))
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
