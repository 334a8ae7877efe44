"""The loop over stages: observe, solve, round, refine, yield, advance."""

import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prox24._core.masks import mean_sparsity
from prox24._core.pattern import AnyPattern
from prox24._core.placement import apart, everywhere
from prox24._core.precision import working_dtype
from prox24._pruning.recipe import Recipe
from prox24._pruning.report import BlockReport, LinearReport
from prox24._pruning.runner import Inputs, Linear, Runner, State, check_found, check_widths
from prox24._pruning.turns import tied_tensors, ties_of, turn
from prox24._solvers.problem import LayerProblem, correct_inputs
from prox24._solvers.scores import Wanda
from prox24._solvers.solve import explain, solve
from prox24.errors import CalibrationError, CheckpointError, RecipeError, SolverError
from prox24.refine._blocks import BlockRefinement, train_block

OnLayerStep = Callable[[int, int, int, float], None]
"""Function of a stage, its number of steps, the number of a step, and the step's loss."""


class Readable(Protocol):
    """A tensor written before."""

    def read(self) -> Any:
        """Its values."""


class PrunedTensor(NamedTuple):
    """The new values of a tensor, ready to be written in the layout of the runner.

    A linear has a report for each matrix. A norm or a bias has no report.
    """

    name: str
    values: Any
    reports: tuple[LinearReport, ...]


class KeptDense(NamedTuple):
    """The tensors that a recipe's `keep_dense` leaves dense.

    Attributes:
      losses: their relative losses by name, the worst first.
      effect: a share and two means, as in `PruneReport.kept_dense_effect`.
    """

    losses: dict[str, float]
    effect: dict[str, float]


def prune_stages(
    runner: Runner[State],
    recipe: Recipe,
    *,
    finished: Mapping[str, Readable] = MappingProxyType({}),
    dense: Collection[str] = (),
    lap: Callable[[str], None] = lambda part: None,
    on_step: OnLayerStep | None = None,
) -> Iterator[PrunedTensor]:
    """Prunes every linear of every stage, except the tensors in `dense`.

    For each stage, the dense stage runs on the outputs of the pruned stages before it, and its
    linears gather their Grams. Attention heads are turned to their learnt basis. Each linear is
    solved. Then the pruned stage runs to feed the next. A linear without tokens, such as an unused
    expert, is pruned as if its Gram were the identity.

    Tensors in `finished` were pruned and written before: they are used, and not yielded. Any other
    linear is yielded once it is solved. With a refinement, the trained tensors of a stage are
    yielded after the training. Yielded tensors are not kept. The recipe's `keep_dense` has no
    effect here; see `most_lossy`.

    `lap` is called at the end of each part of the work with its name: "gather", "basis", "solve",
    "refine", "run" (the pruned stage) or "write" (the caller's work with a tensor).
    `on_step` is called after each step of a refinement.
    """
    chosen = {tensor: own for tensor, own in check(runner, recipe).items() if tensor not in dense}
    refine = recipe.refine
    both = recipe.targets is not None or refine is not None
    first, state = runner.enter(dense=both)
    for index in range(first, runner.stages):
        given = runner.weights(index)
        linears = [linear for linear in runner.linears(index) if linear.tensor in chosen]
        trained = trained_tensors(runner, index, refine)
        together = pruned_together(runner, index, recipe, chosen)
        anew = not together <= finished.keys()
        names = [name for name in given if name in finished and not (anew and name in together)]
        weights = given | {name: runner.loaded(name, finished[name].read()) for name in names}
        remaining = [linear for linear in linears if linear.tensor not in names]
        # A resumed run advances the dense model by the same program, so that all bits are equal.
        inputs: dict[str, list[Inputs]] = {}
        if remaining or both:
            wanted = {linear.input for linear in linears}
            inputs, state = runner.observe(index, given, state, wanted)
        del given  # `weights` holds the arrays that are still needed
        lap("gather")
        if anew and recipe.basis is not None:
            turn(runner, index, recipe, chosen, weights, inputs)
            lap("basis")
        reports: dict[str, tuple[LinearReport, ...]] = {}
        for linear in remaining:
            name = linear.tensor
            weights[name], reports[name] = _pruned(
                runner, recipe, chosen[name], linear, weights[name], inputs[linear.input]
            )
            lap("solve")
            if refine is None:
                yield PrunedTensor(name, runner.stored(name, weights[name]), reports[name])
                lap("write")
        del inputs
        if anew:
            # In the order of the stage, which is the same on every process.
            handed_out = set[str]() if refine is not None else reports.keys()
            rest = [name for name in weights if name in together - handed_out]
            weights |= {name: _rounded(runner, recipe, name, weights[name]) for name in rest}
            if refine is not None:
                outcome = _refine(runner, index, weights, state, refine, trained, chosen, on_step)
                reports = {
                    name: tuple(report._replace(refinement=outcome) for report in own)
                    for name, own in reports.items()
                }
                lap("refine")
            for name in rest:
                yield PrunedTensor(name, runner.stored(name, weights[name]), reports.get(name, ()))
                lap("write")
        state = runner.advance(index, weights, state)
        lap("run")
        del weights


def check(runner: Runner[State], recipe: Recipe) -> dict[str, AnyPattern]:
    """The patterns of the tensors that a recipe prunes; raises an error if it does not fit them."""
    recipe.check_supported()
    linears = [linear for index in range(runner.stages) for linear in runner.linears(index)]
    patterns = {linear.tensor: recipe.pattern_of(linear.tensor) for linear in linears}
    chosen = {tensor: pattern for tensor, pattern in patterns.items() if pattern is not None}
    if not chosen:
        check_found(patterns, recipe)
    check_widths({linear.tensor: linear.width for linear in linears}, recipe)
    return chosen


def most_lossy(runner: Runner[State], recipe: Recipe) -> KeptDense:
    """Chooses the tensors that a recipe's `keep_dense` leaves dense.

    One pass of the dense model ranks all tensors by the relative loss of Wanda's mask.
    """
    if not recipe.keep_dense:
        return KeptDense({}, {})
    chosen, losses, sizes = check(runner, recipe), dict[str, float](), dict[str, int]()
    first, state = runner.enter(dense=False)
    for index in range(first, runner.stages):
        weights = runner.weights(index)
        linears = [linear for linear in runner.linears(index) if linear.tensor in chosen]
        wanted = {linear.input for linear in linears}
        inputs, state = runner.observe(index, weights, state, wanted)
        for linear in linears:
            name, pattern = linear.tensor, chosen[linear.tensor]
            sizes[name] = weights[name].size
            matrices = runner.matrices(linear, weights[name])
            pairs = zip(matrices, inputs[linear.input], strict=True)
            problems = (_problem(runner, matrix, own) for matrix, own in pairs)
            losses[name] = max(
                solve(*each, Wanda(), None, pattern=pattern, throw=False).statistics.relative_loss
                for each in problems
            )
        state = runner.advance(index, weights, state)
    share = recipe.keep_dense
    # A small share of few linears is one of them.
    count = share if isinstance(share, int) else max(1, round(share * len(losses)))
    if count >= len(losses):
        raise RecipeError(f"keep_dense {share} leaves none of {len(losses)} weights to prune")
    dense = dict(sorted(losses.items(), key=lambda pair: pair[1], reverse=True)[:count])
    rest = [loss for name, loss in losses.items() if name not in dense]
    effect = {
        "share_of_weights": sum(sizes[name] for name in dense) / sum(sizes.values()),
        "mean_loss_all_pruned": math.fsum(losses.values()) / len(losses),
        "mean_loss": math.fsum(rest) / len(losses),
    }
    return KeptDense(dense, effect)


def _problem(runner: Runner[State], matrix: Array, inputs: Inputs) -> LayerProblem:
    # If devices share the columns of the Gram, they share the columns of the weight as well.
    axis = 0 if inputs.gram.sharding.is_fully_replicated else 1
    # Kept entries of a float64 weight must not be rounded to the Gram's float32.
    dtype = np.promote_types(working_dtype(matrix.dtype), inputs.gram.dtype)
    gram = inputs.gram.astype(dtype)
    if not inputs.tokens:  # With a Gram of zeros, all scores of Wanda would be equal.
        gram = jnp.fill_diagonal(gram, 1, inplace=False)
    return LayerProblem(apart(matrix.astype(dtype), runner.mesh, axis), gram)


def _pruned(
    runner: Runner[State],
    recipe: Recipe,
    pattern: AnyPattern,
    linear: Linear,
    weight: Array,
    inputs: list[Inputs],
) -> tuple[Array, tuple[LinearReport, ...]]:
    """A weight as it will be written, and a report on each of its matrices."""
    given = runner.matrices(linear, weight)
    pruned, reports = [], []
    for number, (matrix, own) in enumerate(zip(given, inputs, strict=True)):
        began = time.perf_counter()
        name = linear.tensor if len(given) == 1 else f"{linear.tensor}[{number}]"
        problem = _problem(runner, matrix, own)
        if own.tokens and own.cross is not None and recipe.targets is not None:
            corrected = correct_inputs(*problem, own.cross, recipe.targets.pull)
            problem = problem._replace(weight=corrected)
        solution = solve(
            *problem,
            recipe.solver,
            recipe.refit,
            pattern=pattern,
            damping=recipe.damping,
            throw=False,
        )
        if solution.status.failed:
            raise SolverError(explain(solution.status, problem, recipe.damping, name))
        # Rounded one by one: those of a stacked weight need less memory than in float32.
        rounded = _rounded(runner, recipe, linear.tensor, solution.weight)
        pruned.append(everywhere(rounded, runner.mesh))
        reports.append(
            LinearReport(
                name=name,
                status=solution.status,
                sparsity=float(mean_sparsity(solution.weight)),
                parameters=solution.weight.size,
                inputs=own.gram.shape[-1],
                tokens=own.tokens,
                seconds=time.perf_counter() - began,
                statistics=solution.statistics,
            )
        )
        del problem, solution, rounded  # frees memory for the next matrix
    return runner.joined(linear, pruned), tuple(reports)


def _rounded(runner: Runner[State], recipe: Recipe, tensor: str, values: Array) -> Array:
    dtype = runner.dtype(tensor) if recipe.dtype is None else jnp.dtype(recipe.dtype)
    rounded = values.astype(dtype)
    if not _all_finite(rounded):
        raise CheckpointError(f"tensor {tensor} overflows {dtype}; choose another dtype")
    return rounded


@jax.jit
def _all_finite(values: Array) -> Array:
    return jnp.isfinite(values).all()


def pruned_together(
    runner: Runner[State], index: int, recipe: Recipe, chosen: Mapping[str, AnyPattern]
) -> set[str]:
    """The tensors of a stage that are finished together: if one is missing, all are pruned again.

    A refinement trains a stage as a whole, and several linears share one learnt basis.
    """
    trained = trained_tensors(runner, index, recipe.refine)
    return trained | tied_tensors(ties_of(runner, index, recipe, chosen))


def trained_tensors(runner: Runner[State], index: int, refine: BlockRefinement | None) -> set[str]:
    """The tensors of a stage that a refinement trains; empty without a refinement."""
    if refine is None:
        return set()
    if refine.linears_only:
        return {linear.tensor for linear in runner.linears(index)}
    return set(runner.tensors(index))


def _refine(
    runner: Runner[State],
    index: int,
    weights: dict[str, Array],
    state: State,
    refine: BlockRefinement,
    trained: Collection[str],
    pruned: Collection[str],
    on_step: OnLayerStep | None,
) -> BlockReport:
    """Trains the weights of a stage, in place."""
    began = time.perf_counter()
    stage = runner.trainable_stage(index, state)
    groups = len(stage.inputs) // stage.micro_batches
    refined = train_block(
        stage.apply,
        {key: weights[name] for key, name in stage.names.items()},
        stage.inputs,
        stage.targets,
        refine.optimizer(groups),
        passes=refine.passes,
        held_out=refine.held_out_of(groups) * stage.micro_batches,
        micro_batches=stage.micro_batches,
        trainable={
            key: weights[name] != 0 if name in pruned else name in trained
            for key, name in stage.names.items()
        },
        on_step=on_step and functools.partial(on_step, index, refine.steps(groups)),
    )
    weights |= {stage.names[key]: values for key, values in refined.params.items()}
    seconds = time.perf_counter() - began
    if not math.isfinite(refined.losses[0]):
        raise CalibrationError(f"NaN or Inf in the outputs of the pruned layer {index}")
    best = min(loss for loss in refined.losses if math.isfinite(loss))
    return BlockReport(refined.outcome, refined.losses[0], best, refined.steps, seconds)
