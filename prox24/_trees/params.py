"""Pruning the weights of any parameter tree by their Grams."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from prox24._pruning import loop
from prox24._pruning.recipe import Recipe, with_products
from prox24._pruning.report import LinearReport
from prox24._pruning.runner import Inputs, Linear, Runner, check_found
from prox24._trees.calibrate import (
    Calibration,
    InputGram,
    calibrate,
    check_batches,
    survey_products,
)
from prox24._trees.layout import Layout, from_matrices, input_width, problems, to_matrices
from prox24._trees.products import Apply, is_array
from prox24._trees.segments import Values, Walk
from prox24.errors import CalibrationError, RecipeError
from prox24.optax import Leaf, describe
from prox24.optax._leaves import (
    Mask,
    PyTree,
    by_path,
    check_has_value,
    check_values,
    choices,
    map_named,
    named_leaves,
    nonzeros,
)
from prox24.optax._transforms import pruned_axes


class PrunedParams(NamedTuple):
    """A pruned parameter tree.

    Attributes:
      params: the given tree with pruned weights, in the same containers and shapes. Dtypes are the
        same unless the recipe sets one. JAX rounds pruned float64 weights of NumPy to float32,
        unless `jax_enable_x64` is set.
      leaves: for each leaf, whether it is pruned, its axis, and the reason. Each prints as one
        line.
      reports: one for each pruned matrix, in the order of pruning.
    """

    params: PyTree
    leaves: tuple[Leaf, ...]
    reports: list[LinearReport]

    @property
    def trainable(self) -> PyTree:
        """For `prox24.optax.keep_pattern`: the nonzeros of pruned leaves, and all other leaves.

        A leaf that was 2:4 before, such as one that an earlier call pruned, keeps its zeros too.
        """
        values = dict(named_leaves(self.params))
        return nonzeros(
            self.params,
            [
                leaf._replace(pruned=leaf.pruned or bool(pruned_axes(values[leaf.path])))
                for leaf in self.leaves
            ],
        )

    def mask(self, params: PyTree) -> PyTree:
        """Marks the pruned leaves; an argument `mask` for `prox24.report` and the like."""
        return by_path({leaf.path for leaf in self.leaves if leaf.pruned}.__contains__)(params)

    def axis(self, path: str) -> int:
        """The axis of a leaf; an argument `axis` for `prox24.report` and the like.

        Raises:
          ValueError: the pruned tree has no such leaf.
        """
        for leaf in self.leaves:
            if leaf.path == path:
                return leaf.axis
        raise ValueError(f"{path} is no leaf of the pruned tree: give the tree that was pruned")

    def __str__(self) -> str:
        return "\n".join([*map(str, self.leaves), *map(str, self.reports)])


@with_products
def prune_params(
    apply: Apply,
    params: PyTree,
    batches: Iterable[PyTree] = (),
    recipe: Recipe = Recipe(),
    *,
    grams: Calibration | None = None,
    order: Literal["one-shot", "sequential"] = "one-shot",
    mask: Mask | None = None,
) -> PrunedParams:
    """Prunes the weights of any JAX model, along the axes that their products sum over.

    A weight consists of matrices W0 (out, in) with Grams G. For each matrix, `prox24.solve`
    minimises tr((W - W0) G (W - W0)^T) over all W with the pattern. Blocks of M run along the last
    summed axis: the input channel of a convolution, `head_dim` of an attention's output.

    "one-shot" takes all Grams from the dense model. "sequential" prunes weights in the order of
    their first calls, each on its inputs in the pruned model. Weights with one common input, such
    as an attention's query, key and value, are pruned together. So are the layers that `lax.scan`
    runs over. The model stops at each such group, and continues there when the group is pruned.
    Memory holds the activations of all batches, and the Grams of one group. Equal layers are
    compiled once. The recipe's dense targets change this order only: in "one-shot" all inputs are
    the dense model's. Weights in `lax.ragged_dot` have no dense targets, since the order of their
    rows depends on the routes of the tokens.

    A matrix without input rows, such as an unused expert, is pruned as if its Gram were the
    identity. Its reported loss is relative to that Gram.

    Args:
      apply: see `calibrate`.
      params: pytree: dicts, `FrozenDict`, `nnx.State`, NNX or Equinox modules, lists, tuples.
        An NNX module that shares a layer has it twice, and the two are pruned apart. The state of
        `nnx.split` has it once.
      batches: see `calibrate`; the sequential order keeps all batches in memory.
      recipe: how to prune the weights. Its regular expressions match the paths of leaves. `refine`
        must be None; see `prox24.refine.train_block`. `dtype` None keeps each leaf's dtype.
      grams: from `calibrate`, in place of batches; for the "one-shot" order.
      order: "one-shot" or "sequential".
      mask: bool pytree like `params` or a prefix of it: False leaves a weight dense. Or a function
        that makes such a pytree of `params`, such as `prox24.optax.by_path`. By default,
        embeddings and heads stay dense, by their names (`prox24.optax.describe`).

    Returns:
      A `PrunedParams` with the parameters in the same structure, a `Leaf` for each leaf, and a
      report for each pruned matrix.

    Raises:
      CalibrationError: see `calibrate`; or there are neither batches nor Grams, or no leaf has a
        Gram.
      RecipeError: the recipe has `refine`, or its solver does not support a pattern, or the device
        does not have its products. Or no leaf can be pruned, although the mask does not forbid it.
      SolverError: a solution is not finite. The message names the weight.
      ValueError: `params` has no arrays, or has traced ones. A Gram does not fit its weight, the
        order is unknown, or Grams are given beside batches or for the sequential order.

    Example:
      >>> kernel = jax.random.normal(jax.random.key(0), (8, 3))
      >>> params = {"kernel": kernel, "scale": jnp.ones(())}
      >>> x = jax.random.normal(jax.random.key(1), (64, 8))
      >>> def apply(params, x):
      ...     return params["scale"] * (x @ params["kernel"])
      >>> pruned = prune_params(apply, params, [x])
      >>> print(*pruned.leaves, sep="\\n")
      pruned  (8, 3)              axis 0  default                             kernel
      dense   ()                          fewer than two dimensions           scale
      >>> int(jnp.count_nonzero(pruned.params["kernel"]))
      12
    """
    if order not in ("one-shot", "sequential"):
        raise ValueError(f"order {order!r} is neither one-shot nor sequential")
    if recipe.refine is not None:
        raise RecipeError("refine is for decoders; train the result with prox24.refine.train_block")
    if order == "sequential" and grams is not None:
        raise ValueError("grams are of the dense model: the sequential order takes batches")
    check_values(params, "prox24.prune_params")
    map_named(check_has_value, params)
    if isinstance(batches, Calibration) or not isinstance(grams, Calibration | None):
        raise ValueError("a Calibration is given by grams=, and batches as a list")
    if grams is not None and not (isinstance(batches, list | tuple) and not batches):
        raise ValueError("there are batches and grams: give one of the two")
    if order == "one-shot":
        found = calibrate(apply, params, batches) if grams is None else grams
        layouts = {path: own.layout for path, own in found.grams.items()}
        # One by one, since the loop copies the Grams of a group.
        groups, left_out = [[path] for path in layouts], found.left_out
    else:
        batches = check_batches(batches)
        survey = survey_products(apply, params, batches[0])
        layouts, groups, left_out = survey.layouts, survey.groups, survey.left_out
    given = dict(named_leaves(params))
    if grams is not None:
        _check_paths(given, grams)
    leaves = _choose(params, layouts, left_out, recipe, mask)
    if grams is not None:
        _check_numbers(leaves, grams)
    chosen = {leaf.path for leaf in leaves if leaf.pruned}
    groups = [own for group in groups if (own := [path for path in group if path in chosen])]
    if linears := [leaf.path for leaf in leaves if leaf.pruned or leaf.reason == BY_RECIPE]:
        check_found(linears, recipe)
    elif all(leaf.reason == NOT_IN_MASK for leaf in leaves):
        return PrunedParams(params, leaves, [])
    else:
        matrices_first = sorted(leaves, key=lambda leaf: len(leaf.shape) < 2)
        reasons = [f"{leaf.path}: {leaf.reason}" for leaf in matrices_first]
        raise RecipeError(f"no leaf can be pruned ({_some(reasons)})")
    if order == "one-shot":
        runner = FunctionRunner(given, groups, layouts, found.grams)
    else:
        walk = Walk(apply, params, batches, groups, survey)
        runner = SequentialRunner(given, groups, layouts, {}, walk)
    dense = loop.most_lossy(runner, recipe).losses
    pruned = list(loop.prune_stages(runner, recipe, dense=dense))
    leaves = tuple(
        leaf._replace(pruned=False, reason="among those that lose most")
        if leaf.path in dense
        else leaf
        for leaf in leaves
    )
    values = {tensor.name: tensor.values for tensor in pruned}
    reports = [report for tensor in pruned for report in tensor.reports]
    return PrunedParams(map_named(values.get, params), leaves, reports)


BY_RECIPE, NOT_IN_MASK = "dense by the recipe", "not in mask"


def _check_paths(given: Mapping[str, Any], grams: Calibration) -> None:
    """Raises CalibrationError if no leaf of the tree has a Gram."""
    if not grams.grams.keys() & given.keys():
        raise CalibrationError(
            f"no leaf of params has a Gram: the Grams are of {_some(grams.grams)}, the leaves are "
            f"{_some(given)}; give the tree that was calibrated"
        )


def _check_numbers(leaves: Sequence[Leaf], grams: Calibration) -> None:
    """Raises ValueError if a pruned leaf has other matrices than its Grams."""
    for leaf in leaves:
        if leaf.pruned:
            own = grams.grams[leaf.path]
            count, width = problems(leaf.shape, own.layout), input_width(leaf.shape, own.layout)
            if own.gram.shape != (count, width, width):
                raise ValueError(
                    f"{leaf.path} of shape {leaf.shape} has Grams of shape {(count, width, width)},"
                    f" not {own.gram.shape}: give the tree that was calibrated"
                )


def _length(leaf: Leaf, layout: Layout) -> int:
    """The length of the last summed axis; raises ValueError if the Gram has other axes."""
    count = len(layout.stacked + layout.outputs + layout.summed)
    if count != len(leaf.shape):
        raise ValueError(
            f"the Gram of {leaf.path} is of a weight with {count} axes, the leaf has shape "
            f"{leaf.shape}: give the tree that was calibrated"
        )
    return leaf.shape[layout.summed[-1]]


def _some(paths: Collection[str]) -> str:
    return ", ".join(list(paths)[:3]) + ", ..." * (len(paths) > 3)


@dataclasses.dataclass(frozen=True)
class FunctionRunner(Runner[Any]):
    """A function of JAX as a `prox24._pruning.runner.Runner`, with Grams computed before."""

    given: Mapping[str, Any]  # The dense leaves, by path.
    groups: list[list[str]]
    layouts: Mapping[str, Layout]
    grams: Mapping[str, InputGram]

    @property
    def stages(self) -> int:
        """The number of groups."""
        return len(self.groups)

    def linears(self, index: int) -> list[Linear]:
        """The weights of a group."""
        axes = {path: self.layouts[path].summed[-1] for path in self.groups[index]}
        return [Linear(path, path, self.given[path].shape[axis]) for path, axis in axes.items()]

    def weights(self, index: int) -> dict[str, Array]:
        """The dense weights of a group."""
        return {path: jnp.asarray(self.given[path]) for path in self.groups[index]}

    def enter(self, dense: bool) -> tuple[int, Any]:
        """Stage 0 and no state: the model does not run."""
        return 0, None

    def observe(
        self, index: int, weights: Mapping[str, Array], state: Any, wanted: Collection[str]
    ) -> tuple[dict[str, list[Inputs]], Any]:
        """The given Grams."""
        return {path: self.grams[path].inputs() for path in wanted}, state

    def advance(self, index: int, weights: Mapping[str, Array], state: Any) -> Any:
        """The same state."""
        return state

    def dtype(self, tensor: str) -> np.dtype[Any]:
        """The leaf's dtype."""
        return jnp.asarray(self.given[tensor]).dtype

    def matrices(self, linear: Linear, weight: Array) -> list[Array]:
        """One matrix for each problem."""
        return to_matrices(weight, self.layouts[linear.tensor])

    def joined(self, linear: Linear, matrices: list[Array]) -> Array:
        """The leaf in its own shape, and on the devices of the dense leaf."""
        given = self.given[linear.tensor]
        weight = from_matrices(matrices, self.layouts[linear.tensor], given.shape)
        placed = getattr(given, "sharding", None)
        return jax.device_put(weight, placed) if isinstance(placed, NamedSharding) else weight

    def stored(self, tensor: str, weight: Array) -> Array:
        """The weight itself, on its device."""
        return weight


class Progress(NamedTuple):
    """The next segment, and the streams before it: the pruned model's, then any dense model's."""

    segment: int
    streams: list[Values]


@dataclasses.dataclass(frozen=True)
class SequentialRunner(FunctionRunner):
    """Runs the model group by group: the inputs of each group come from the pruned groups."""

    walk: Walk

    def enter(self, dense: bool) -> tuple[int, Progress]:
        """Stage 0, with the dense parameters before the first segment."""
        return 0, Progress(0, [self.walk.start] * (1 + dense))

    def observe(
        self, index: int, weights: Mapping[str, Array], state: Progress, wanted: Collection[str]
    ) -> tuple[dict[str, list[Inputs]], Progress]:
        """Runs every segment up to the group, also the segments of dense groups before it."""
        streams, found = state.streams, dict[str, InputGram]()
        for number in range(state.segment, index + 1):
            own = wanted if number == index else ()
            if number:
                found, streams = self.walk.step(number, streams, own)
            else:  # Nothing is pruned yet: both streams are equal.
                found, (stream,) = self.walk.step(number, streams[:1], own)
                streams = [stream] * len(streams)
        return {path: found[path].inputs() for path in wanted}, Progress(index + 1, streams)

    def advance(self, index: int, weights: Mapping[str, Array], state: Progress) -> Progress:
        """Puts the weights of a group into the pruned stream, in the dtypes of the model."""
        own = {path: weight.astype(self.dtype(path)) for path, weight in weights.items()}
        pruned, *dense = state.streams
        return state._replace(streams=[self.walk.replaced(pruned, own), *dense])


def _choose(
    params: PyTree,
    layouts: dict[str, Layout],
    left_out: dict[str, str],
    recipe: Recipe,
    mask: Mask | None,
) -> tuple[Leaf, ...]:
    # A block of 1 divides every length, so only names, dtypes and numbers of axes decide here.
    by_name, weights = describe(params, (1, 1)), jax.tree.leaves(params)

    def choose(leaf: Leaf, weight: Any, wanted: bool | None) -> Leaf:
        layout = layouts.get(leaf.path)
        axis = leaf.axis if layout is None else layout.summed[-1]
        if wanted is None and not leaf.pruned:
            reason = leaf.reason
        elif wanted is not None and not wanted:
            reason = NOT_IN_MASK
        elif not (is_array(weight) and jnp.issubdtype(weight.dtype, jnp.floating)):
            reason = "it is not a floating array"
        elif (pattern := recipe.pattern_of(leaf.path)) is None:
            reason = BY_RECIPE
        elif layout is None:
            reason = f"no Gram: {left_out.get(leaf.path, 'unused')}"
        elif _length(leaf, layout) % pattern.width:
            reason = f"axis {axis} is not divisible by {pattern.width}"
        else:
            reason = "default" if wanted is None else "in mask"
            return leaf._replace(axis=axis, pruned=True, reason=reason)
        return leaf._replace(axis=axis, pruned=False, reason=reason)

    return tuple(map(choose, by_name, weights, choices(mask, params)))
