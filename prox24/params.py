"""Pruning the weights of any parameter tree by their Grams."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prox24.calibration.calibrate import Calibration, InputGram, calibrate, survey_products
from prox24.calibration.gram import identity_if_unseen
from prox24.calibration.layout import Layout, from_matrices, to_matrices
from prox24.calibration.products import Apply
from prox24.core.pattern import PatternLike, Unstructured, as_pattern
from prox24.errors import CalibrationError, SolverError
from prox24.optax.leaves import Leaf, Mask, PyTree, describe, nonzeros, spread
from prox24.solvers.admm import ADMM
from prox24.solvers.problem import LayerProblem, Statistics, Status
from prox24.solvers.refit import ConjugateGradients
from prox24.solvers.solve import Refit, Solver, solve


class WeightReport(NamedTuple):
    """How one matrix was pruned; printed, it is one line.

    Attributes:
      name: the weight's path, followed by [i] where it is made of several matrices.
      rows: of inputs that its Gram has seen.
      width: of the inputs. A Gram of fewer rows is singular: damping alone says how far weights may
        move where nothing was seen.
      status: how the solver ended.
      statistics: the losses and what else `prox24.solve` says.
    """

    name: str
    rows: int
    width: int
    status: Status
    statistics: Statistics

    def __str__(self) -> str:
        few = ", too few" if self.rows < self.width else ""
        return (
            f"{self.status.value:9}  loss {self.statistics.relative_loss:.4f}  "
            f"{self.rows} rows of {self.width}{few}  {self.name}"
        )


class PrunedParams(NamedTuple):
    """A pruned parameter tree.

    Attributes:
      params: the tree that was given, in its containers, with the pruned weights in their places,
        shapes and dtypes.
      leaves: which leaves are pruned, along which axis, and why others are not; each prints as one
        line.
      reports: one for each pruned matrix, in the order of the leaves, or of the calls.
    """

    params: PyTree
    leaves: tuple[Leaf, ...]
    reports: list[WeightReport]

    @property
    def kept(self) -> PyTree:
        """For `prox24.optax.keep_pattern`: the nonzeros of what was pruned, and all else."""
        return nonzeros(self.params, self.leaves)


def prune_params(
    params: PyTree,
    calibration: Calibration,
    solver: Solver = ADMM(),
    refit: Refit | None = ConjugateGradients(),
    *,
    pattern: PatternLike | Unstructured = (2, 4),
    damping: float = 0.01,
    mask: Mask | None = None,
) -> PrunedParams:
    """Prunes every weight that has a Gram, along the axes that its product sums over.

    For a weight of matrices W0 (out, in) and their Grams G it minimises tr((W - W0) G (W - W0)^T)
    over W of the pattern, by `prox24.solve`. Blocks of M run along the last summed axis, which is
    the input channel of a convolution and `head_dim` of an attention's output.

    All Grams come from the dense model: nothing makes up for what pruning one layer does to the
    inputs of the next, see `prune_in_order`. A matrix that no row has met, as an expert may, is
    pruned as if its Gram were the identity, of which its loss is then told.

    Args:
      params: pytree: dicts, `FrozenDict`, `nnx.State`, NNX or Equinox modules, lists, tuples.
      calibration: what `calibrate` returned for it.
      solver: finds the masks, see `prox24.solve`.
      refit: updates the kept weights, or None.
      pattern: (N, M), or `Unstructured`: the fraction of zeros in each matrix or its rows.
      damping: see `prox24.solve`.
      mask: bool pytree like `params` or a prefix of it, False for weights to leave dense, or a
        function of `params` that returns one, such as `prox24.optax.by_path`. By default embeddings
        and heads are left dense, as their names tell (`prox24.optax.describe`).

    Returns:
      The parameters, of the same structure and dtypes; what was done with each leaf; and a report
      on each weight that was pruned.

    Raises:
      SolverError: a solution is not finite; names the weight.
      ValueError: a Gram does not fit its weight, or the solver does not support the pattern.

    Example:
      >>> from prox24 import calibrate
      >>> kernel = jax.random.normal(jax.random.key(0), (8, 3))
      >>> params = {"kernel": kernel, "scale": jnp.ones(())}
      >>> x = jax.random.normal(jax.random.key(1), (64, 8))
      >>> def apply(params, x):
      ...     return params["scale"] * (x @ params["kernel"])
      >>> pruned = prune_params(params, calibrate(apply, params, [x]))
      >>> print(*pruned.leaves, sep="\\n")
      pruned  (8, 3)              axis 0  default                             kernel
      dense   ()                          fewer than two dimensions           scale
      >>> int(jnp.count_nonzero(pruned.params["kernel"]))
      12
    """
    layouts = {path: found.layout for path, found in calibration.grams.items()}
    leaves = _choose(params, layouts, calibration.left_out, pattern, mask)
    params, reports = _prune(params, leaves, calibration.grams, solver, refit, pattern, damping)
    return PrunedParams(params, leaves, reports)


def prune_in_order(
    apply: Apply,
    params: PyTree,
    batches: Iterable[PyTree],
    solver: Solver = ADMM(),
    refit: Refit | None = ConjugateGradients(),
    *,
    pattern: PatternLike | Unstructured = (2, 4),
    damping: float = 0.01,
    mask: Mask | None = None,
) -> PrunedParams:
    """Prunes weights in the order of their first calls, each calibrated after those before it.

    The Gram of a weight is then that of the inputs it will have in the pruned model. Weights that
    see one common input, such as an attention's query, key and value, are calibrated together, and
    so are the layers that `lax.scan` runs over.

    Each group of such weights costs one run of the model over all batches, up to that group, and
    one compilation: G groups take about as long as G / 2 runs of the whole model, or as their
    compilations if the model is small. Only one group's Grams are in memory.

    Args:
      apply: see `calibrate`.
      params: see `prune_params`.
      batches: see `calibrate`; all are kept.
      solver: see `prune_params`.
      refit: see `prune_params`.
      pattern: see `prune_params`.
      damping: see `prune_params`.
      mask: see `prune_params`.

    Returns:
      See `prune_params`.

    Raises:
      CalibrationError: see `calibrate`.
      SolverError: see `prune_params`.
      ValueError: see `prune_params`.

    Example:
      >>> from prox24 import is_sparse
      >>> first, second = jax.random.normal(jax.random.key(0), (2, 8, 8))
      >>> x = jax.random.normal(jax.random.key(1), (64, 8))
      >>> def apply(params, x):
      ...     return jnp.tanh(x @ params["first"]) @ params["second"]
      >>> pruned = prune_in_order(apply, {"first": first, "second": second}, [x])
      >>> [report.name for report in pruned.reports]
      ['first', 'second']
    """
    batches = list(batches)
    if not batches:
        raise CalibrationError("there is no batch to calibrate on")
    survey = survey_products(apply, params, batches[0])
    leaves = _choose(params, survey.layouts, survey.left_out, pattern, mask)
    chosen = {leaf.path for leaf in leaves if leaf.pruned}
    reports: list[WeightReport] = []
    for group in survey.groups:
        names = [path for path in group if path in chosen]
        if names:
            grams = calibrate(apply, params, batches, names=names).grams
            params, group_reports = _prune(params, leaves, grams, solver, refit, pattern, damping)
            reports += group_reports
    return PrunedParams(params, leaves, reports)


def _choose(
    params: PyTree,
    layouts: dict[str, Layout],
    left_out: dict[str, str],
    pattern: PatternLike | Unstructured,
    mask: Mask | None,
) -> tuple[Leaf, ...]:
    group = 1 if isinstance(pattern, Unstructured) else as_pattern(pattern).group
    # Every length is a multiple of 1: by itself, this says what names and shapes say.
    by_name = describe(params, (1, 1), axis=0)
    wanted = [None] * len(by_name) if mask is None else jax.tree.leaves(spread(mask, params))

    def choose(leaf: Leaf, wanted: bool | None) -> Leaf:
        layout = layouts.get(leaf.path)
        axis = 0 if layout is None else layout.summed[-1]
        if wanted is None and not leaf.pruned:
            reason = leaf.reason
        elif wanted is not None and not wanted:
            reason = "not in mask"
        elif layout is None:
            reason = f"no Gram: {left_out.get(leaf.path, 'unused')}"
        elif leaf.shape[axis] % group:
            reason = f"axis {axis} is not divisible by {group}"
        else:
            reason = "default" if wanted is None else "in mask"
            return leaf._replace(axis=axis, pruned=True, reason=reason)
        return leaf._replace(axis=axis, pruned=False, reason=reason)

    return tuple(map(choose, by_name, wanted))


def _prune(
    params: PyTree,
    leaves: tuple[Leaf, ...],
    grams: dict[str, InputGram],
    solver: Solver,
    refit: Refit | None,
    pattern: PatternLike | Unstructured,
    damping: float,
) -> tuple[PyTree, list[WeightReport]]:
    """The tree with those of the chosen leaves pruned that have a Gram here."""
    values, structure = jax.tree.flatten(params)
    reports: list[WeightReport] = []
    for i, leaf in enumerate(leaves):
        if not leaf.pruned or leaf.path not in grams:
            continue
        gram, rows, layout = grams[leaf.path]
        matrices = to_matrices(jnp.asarray(values[i]), layout)
        pruned: list[Array] = []
        problems = map(LayerProblem, matrices, map(identity_if_unseen, gram, rows))
        for problem, seen in zip(problems, rows, strict=True):
            solution = solve(problem, solver, refit, pattern=pattern, damping=damping)
            name = leaf.path if len(matrices) == 1 else f"{leaf.path}[{len(pruned)}]"
            if solution.status is Status.INDEFINITE:
                raise SolverError(f"the Gram of {name} is not positive semidefinite")
            if solution.status is Status.NONFINITE:
                for part, entries in zip(("", "the Gram of "), problem, strict=True):
                    if not jnp.isfinite(entries).all():
                        raise SolverError(f"{part}{name} holds NaN or Inf")
                raise SolverError(
                    f"no finite solution for {name}: its Gram is not positive definite with "
                    f"damping {damping}, or numbers are too large for {matrices.dtype}"
                )
            width = gram.shape[-1]
            reports.append(WeightReport(name, seen, width, solution.status, solution.statistics))
            pruned.append(solution.weight)
        values[i] = from_matrices(jnp.stack(pruned), layout, leaf.shape)
    return jax.tree.unflatten(structure, values), reports
