"""Pruning a model layer after layer, each calibrated on the output of the pruned ones before it."""

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from prox24.calibration.gram import Sums, add_layer_inputs, empty_gram
from prox24.checkpoints.checkpoint import Checkpoint
from prox24.core.masks import mean_sparsity
from prox24.core.pattern import PatternLike, Unstructured, as_pattern
from prox24.errors import CalibrationError, CheckpointError, SolverError
from prox24.forward import Model, embed_windows, layer_weights, load_model, run_layer
from prox24.solvers.problem import LayerProblem, Solution, Status, correct_inputs
from prox24.solvers.solve import Refit, Solver, solve


class LinearReport(NamedTuple):
    """How one linear was pruned; the fields of `prox24.Statistics` with a name and costs.

    Attributes:
      name: the tensor, by HF's name.
      status: the value of a `prox24.Status`.
      sparsity: fraction of exact zeros.
      seconds: wall-clock time of the solver and the refit, compilation included.
    """

    name: str
    status: str
    relative_loss: float
    relative_loss_before_refit: float
    sparsity: float
    steps: int
    refit_steps: int
    dense_blocks: int
    dead_features: int
    damping: float
    damping_raised: bool
    seconds: float


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
    on_linear: Callable[[LinearReport], None] = lambda report: None,
) -> PrunedModel:
    """Prunes every linear of every decoder layer; embedding, norms and head are left alone.

    For each layer the Grams of its linears are gathered with the layer still dense, from the
    activations that come out of the pruned layers before it; then each linear is solved, and the
    layer runs again, pruned, to feed the next.

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
      on_linear: called after each linear, for progress.

    Raises:
      CheckpointError: a linear's input width is not divisible by M.
      CalibrationError: activations are not finite; names the layer.
      SolverError: a solution is not finite; names the tensor.
      ValueError: the solver does not support the pattern.
    """
    model = load_model(checkpoint)
    check_widths(model, pattern)
    hidden = embed_windows(model, windows)
    dense_hidden = None if pull is None else hidden
    tensors: dict[str, NDArray[Any]] = {}
    reports: list[LinearReport] = []
    for index in range(model.config.layers):
        prefix = model.family.layer_prefix(index)
        dense = layer_weights(model, index)
        weights = dict(dense)
        grams, crosses = gather_grams(model, dense, hidden, prefix, dense_hidden)
        for linear, input_name in model.family.LINEAR_INPUTS.items():
            name = f"{linear}.weight"
            began = time.perf_counter()
            problem = LayerProblem(dense[name].astype(jnp.float32), grams[input_name])
            if pull is not None:
                problem = correct_inputs(problem, crosses[input_name], pull)
            solution = solve(problem, solver, refit, pattern=pattern, damping=damping)
            # What comes after sees the weight as it will be written, unless another dtype is asked.
            weights[name] = solution.weight.astype(dense[name].dtype)
            report = _report(prefix + name, solution, time.perf_counter() - began)
            tensors[prefix + name] = np.asarray(solution.weight)
            reports.append(report)
            on_linear(report)
        hidden = [run_layer(model.family, model.config, weights, batch) for batch in hidden]
        if dense_hidden is not None:
            dense_hidden = [
                run_layer(model.family, model.config, dense, batch) for batch in dense_hidden
            ]
    return PrunedModel(tensors, reports)


def check_widths(model: Model, pattern: PatternLike | Unstructured) -> None:
    """Raises CheckpointError, naming the tensor, where M does not divide an input width."""
    if isinstance(pattern, Unstructured):
        return
    group = as_pattern(pattern).group
    for name in linear_names(model):
        width = model.checkpoint.tensors[name].shape[1]
        if width % group:
            raise CheckpointError(
                f"tensor {name} has input width {width}, not divisible by {group}: "
                f"the pattern {as_pattern(pattern)} does not fit"
            )


def linear_names(model: Model) -> list[str]:
    """The tensors that are pruned, in the order of pruning."""
    return [
        f"{model.family.layer_prefix(index)}{linear}.weight"
        for index in range(model.config.layers)
        for linear in model.family.LINEAR_INPUTS
    ]


def gather_grams(
    model: Model,
    weights: dict[str, Array],
    hidden: list[Array],
    prefix: str,
    dense_hidden: list[Array] | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The Grams and the cross-Grams of the inputs of a layer's linears, by input name.

    Args:
      model: the model.
      weights: the dense layer's tensors.
      hidden: micro-batches of what enters the layer in the pruned model.
      prefix: of the layer, for errors.
      dense_hidden: the same in the dense model; without it there are no cross-Grams.

    Raises:
      CalibrationError: an input holds NaN or Inf; names it.
    """

    def empty() -> Sums:
        return {
            input_name: empty_gram(weights[f"{linear}.weight"].shape[1])
            for linear, input_name in model.family.LINEAR_INPUTS.items()
        }

    grams, crosses = empty(), {} if dense_hidden is None else empty()
    alongside = itertools.repeat(None, len(hidden)) if dense_hidden is None else dense_hidden
    for batch, dense_batch in zip(hidden, alongside, strict=True):
        grams, crosses = add_layer_inputs(
            model.family, model.config, weights, batch, dense_batch, grams, crosses
        )
    for name, gram in [*grams.items(), *crosses.items()]:
        if not jnp.isfinite(jnp.trace(gram.total)):
            raise CalibrationError(f"NaN or Inf in the activations {prefix}{name}")
    return (
        {name: gram.total for name, gram in grams.items()},
        {name: cross.total for name, cross in crosses.items()},
    )


def _report(name: str, solution: Solution, seconds: float) -> LinearReport:
    if solution.status is Status.NONFINITE:
        raise SolverError(
            f"no finite solution for {name}: its Gram is not positive definite; raise --damping"
        )
    return LinearReport(
        name=name,
        status=solution.status.value,
        sparsity=float(mean_sparsity(solution.weight)),
        seconds=seconds,
        **solution.statistics._asdict(),
    )
