"""The memory and the operations that pruning a model takes, before it starts."""

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prox24._checkpoints.checkpoint import DTYPES
from prox24._core.compiling import quick_options
from prox24._jobs import forward
from prox24._jobs.forward import Linear, Model
from prox24._jobs.observe import layer_inputs, observe_layer
from prox24._models import spec
from prox24._models.heads import attention_ties
from prox24._pruning.grams import Sums, empty_gram
from prox24._pruning.recipe import Recipe
from prox24._pruning.runner import check_found, check_widths
from prox24._solvers.damping import WIDEST_BLOCK
from prox24._solvers.problem import LayerProblem, corrected_weight
from prox24._solvers.solve import check_shares_columns, check_traits, solve_program
from prox24.errors import Prox24Error, RecipeError
from prox24.refine._blocks import block_step

Spec = jax.ShapeDtypeStruct


class Memory(NamedTuple):
    """Bytes on a device while one layer is pruned: of its weights and of its Grams, once each.

    `gather` is the most while Grams are gathered: weights, Grams and a micro-batch. `solve` is the
    most while a linear is solved, which is most for `widest`: weights twice, Grams, and what the
    solver needs.
    """

    weights: int
    grams: int
    gather: int
    solve: int
    widest: str


class Setup(NamedTuple):
    """The recipe and the devices, which share rows of weights, or columns as in `prox24.prune`."""

    recipe: Recipe
    devices: int = 1
    shard_grams: bool = False

    def sharing(self, width: int) -> int:
        """The number of devices that share the columns of a Gram."""
        return self.devices if self.shard_grams and width % self.devices == 0 else 1

    def rows(self, shape: tuple[int, ...]) -> int:
        """The number of rows that a device solves: what the devices do not divide is for each."""
        outputs, width = shape
        shared = self.sharing(width) == 1 and outputs % self.devices == 0
        return outputs // self.devices if shared else outputs


def checked_setup(model: Model, recipe: Recipe, devices: int, shard_grams: bool) -> Setup:
    """The setup; raises an error where a pattern does not fit, or Grams cannot be shared."""
    widths = {linear.tensor: linear.shape[1] for linear in forward.all_linears(model.config)}
    check_found(widths, recipe)
    check_widths(widths, recipe)
    if shard_grams:
        try:
            check_shares_columns(recipe.solver, recipe.refit)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        if devices == 1:
            raise Prox24Error("shard_grams is for several devices, and there is one to be used")
    return Setup(recipe, devices, shard_grams)


def layer_memory(model: Model, index: int, micro_batch: tuple[int, int], setup: Setup) -> Memory:
    """Bytes that XLA's compiler reserves for the programs of one layer, which are not run.

    It is asked about one device, on which a micro-batch has the shape (windows, length). Where
    devices share columns, the bytes of each are estimated from its answer.
    """
    linears = _pruned_linears(model, index, setup.recipe)
    held = _held(_weights(model, index))
    pruned = _held(_weights(model, index, setup.recipe.dtype))
    grams = sum(4 * width**2 // setup.sharing(width) for width in _widths(linears).values())
    largest = _largest(linears, setup)
    with ThreadPoolExecutor() as pool:  # XLA compiles the programs beside each other.
        solving_each = pool.map(partial(_solving, setup=setup), largest)
        correcting_each = pool.map(partial(_correcting, setup=setup), largest)
        gather = pool.submit(_gathering, model, index, micro_batch, setup)
    solving = {
        linear.tensor: _on_a_device(linear, max(needed), setup)
        for linear, *needed in zip(largest, solving_each, correcting_each, strict=True)
    }
    widest = max(solving, key=solving.__getitem__, default="")
    turning = _turning(model, index, setup.recipe)
    return Memory(
        weights=held,
        grams=grams,
        gather=gather.result(),
        solve=held + pruned + grams * streams(setup.recipe) + max(solving.get(widest, 0), turning),
        widest=widest,
    )


def fitting_micro_batch(model: Model, windows: tuple[int, int], setup: Setup, budget: int) -> int:
    """The most windows that may go through a layer together within a budget of bytes a device.

    The windows have the shape (count, length), and the devices divide them. The result is a divisor
    of their number; one window, or the solver, that needs more than the budget is an error.
    """
    (count, length), devices, refine = windows, setup.devices, setup.recipe.refine
    whole = count // devices
    if refine is not None:
        whole = refine.step_windows(count, length, devices) // devices
    most = whole

    def needed(index: int, size: int) -> int:
        gathering = _gathering(model, index, (size, length), setup)
        refining = refining_memory(model, index, (size, length), setup.recipe, whole // size)
        return max(gathering, refining)

    for index in distinct_layers(model):
        memory = layer_memory(model, index, (1, length), setup)
        for name, bytes_needed in (
            (f"solving {memory.widest}", memory.solve),
            (f"one window in layer {index}", needed(index, 1)),
        ):
            if bytes_needed > budget:
                raise Prox24Error(
                    f"memory is too small: {name} takes {bytes_needed / 2**30:.2f} GiB"
                )
        sizes = forward.micro_batches_of(whole, most)
        most = next(size for size in sizes if needed(index, size) <= budget)
    return most * devices


def distinct_layers(model: Model) -> list[int]:
    """The first layer of each kind; equal ones have equal programs."""
    layers = model.config.layers
    return sorted({layer: index for index, layer in reversed(list(enumerate(layers)))}.values())


def operations(model: Model, tokens: int, recipe: Recipe) -> dict[str, float]:
    """Multiplications and additions; attention, norms and the solver are left out.

    "forward" has the passes through every layer: two, or three with the dense model alongside.
    "grams" has Grams and cross-Grams.
    """
    passes = grams = 0.0
    for index in range(len(model.config.layers)):
        linears = forward.layer_linears(model.config, index)
        passes += sum(2.0 * math.prod(linear.shape) for linear in linears)
        grams += sum(2.0 * width**2 for width in _widths(linears).values())
    alongside = recipe.targets is not None or recipe.refine is not None
    return {
        "forward": (2 + alongside) * tokens * passes,
        "grams": streams(recipe) * tokens * grams,
    }


def streams(recipe: Recipe) -> int:
    """The number of models whose activations make Grams: two with dense targets."""
    return 1 if recipe.targets is None else 2


def _weights(model: Model, index: int, dtype: str | None = None) -> dict[str, Spec]:
    """The tensors of a layer, in their own dtypes; linears in another one if it is given."""
    tensors, names = model.checkpoint.tensors, forward.layer_names(model.config, index)
    shapes = spec.layer_shapes(model.config.layers[index])
    weights = {name: Spec(shape, tensors[names[name]].dtype) for name, shape in shapes.items()}
    if dtype is not None:
        for linear in forward.layer_linears(model.config, index):
            weights[linear.weight] = Spec(linear.shape, DTYPES[dtype])
    return weights


def _pruned_linears(model: Model, index: int, recipe: Recipe) -> list[Linear]:
    linears = forward.layer_linears(model.config, index)
    return [linear for linear in linears if recipe.pattern_of(linear.tensor) is not None]


def _widths(linears: Iterable[Linear]) -> dict[str, int]:
    return {linear.input: linear.shape[1] for linear in linears}


def _gathering(model: Model, index: int, micro_batch: tuple[int, int], setup: Setup) -> int:
    recipe, layer = setup.recipe, model.config.layers[index]
    widths = _widths(_pruned_linears(model, index, recipe))
    weights, hidden = _weights(model, index), Spec((*micro_batch, layer.hidden), jnp.float32)
    sums: Sums = jax.eval_shape(lambda: {name: empty_gram(w) for name, w in widths.items()})
    alongside = None if recipe.targets is None and recipe.refine is None else hidden
    crosses = {} if recipe.targets is None else sums
    needed = _needed(observe_layer.lower(layer, weights, hidden, alongside, sums, crosses))
    if not setup.shard_grams or setup.devices == 1 or not widths:
        return needed
    # A device has a part of what the Grams take, and the tokens that another one sends.
    inputs = [hidden] * streams(recipe)

    @jax.jit
    def run(weights: dict[str, Array], inputs: list[Array]) -> list[dict[str, Array]]:
        return [layer_inputs(layer, weights, hidden) for hidden in inputs]

    alone = _needed(run.lower(weights, inputs))
    whole = sum(width**2 for width in widths.values())
    part = sum(width**2 / setup.sharing(width) for width in widths.values()) / whole
    sent = 4 * math.prod(micro_batch) * max(widths.values()) * len(inputs)
    return alone + int(max(0, needed - alone) * part) + sent


def _largest(linears: Iterable[Linear], setup: Setup) -> list[Linear]:
    """The linears whose solver may need most: it needs more for more entries and wider Grams."""
    asked: dict[Any, Linear] = {}
    for linear in linears:
        kind = setup.recipe.pattern_of(linear.tensor), setup.sharing(linear.shape[1])
        asked[*kind, setup.rows(linear.shape), linear.shape[1]] = linear

    def is_larger(other: Any, key: Any) -> bool:
        (*kind, rows, width), (*other_kind, more, wider) = key, other
        return kind == other_kind and more * wider >= rows * width and wider >= width

    return [
        linear
        for key, linear in asked.items()
        if not any(is_larger(other, key) for other in asked if other != key)
    ]


def _solving(linear: Linear, setup: Setup) -> int:
    """Beside the Gram, to solve."""
    recipe, problem = setup.recipe, _problem(linear, setup)
    pattern = recipe.pattern_of(linear.tensor)
    assert pattern is not None
    methods = recipe.solver, recipe.refit
    try:
        check_traits(*methods, pattern)
        program = solve_program.lower(problem, *methods, Spec((), jnp.float32), pattern=pattern)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return _needed(program) - _bytes(problem.gram)


def _correcting(linear: Linear, setup: Setup) -> int:
    """Beside the Gram and the cross-Gram, to correct the weight for dense targets; or 0."""
    if setup.recipe.targets is None:
        return 0
    problem = _problem(linear, setup)
    program = corrected_weight.lower(*problem, problem.gram, Spec((), jnp.float32))
    return _needed(program) - 2 * _bytes(problem.gram)


def _problem(linear: Linear, setup: Setup) -> Any:
    width = linear.shape[1]
    shapes = (setup.rows(linear.shape), width), (width, width)
    return LayerProblem(*(Spec(shape, jnp.float32) for shape in shapes))  # type: ignore[arg-type]


def _on_a_device(linear: Linear, needed: int, setup: Setup) -> int:
    """Of what one device would need, where several share the columns."""
    (outputs, width), recipe = linear.shape, setup.recipe
    sharing = setup.sharing(width)
    if sharing == 1:
        return needed
    # Each holds a whole weight, for its product with a Gram, and the rows of a block of an inverse,
    # before and after the product with its pivot.
    inverts = recipe.solver.needs_definite or recipe.targets is not None
    swept = 2 * min(WIDEST_BLOCK, width) if inverts else 0
    return needed // sharing + 4 * (outputs + swept) * width


def refining_memory(
    model: Model, index: int, micro_batch: tuple[int, int], recipe: Recipe, micro_batches: int
) -> int:
    """Bytes of all that is there while a layer is trained, by steps of micro-batches; or 0."""
    if recipe.refine is None:
        return 0
    weights, layer = _weights(model, index, recipe.dtype), model.config.layers[index]
    hidden = Spec((*micro_batch, layer.hidden), jnp.float32)
    apply = forward.layer_function(layer, None, recipe.refine.compute_dtype)
    step = block_step(apply, weights, hidden, hidden, recipe.refine, micro_batches)
    # The weights to begin with and the best ones are kept besides.
    return 2 * _held(weights) + _needed(step)


TURNING = 8
"""Copies of the weights of one basis that learning it takes; a test asks XLA for their number."""


def _turning(model: Model, index: int, recipe: Recipe) -> int:
    """Beside the weights and Grams, while a basis is learnt."""
    if recipe.basis is None:
        return 0
    pruned = {linear.weight: linear for linear in _pruned_linears(model, index, recipe)}
    ties = attention_ties(model.config.layers[index].attention)
    names = [{f"{linear}.weight" for linear, *_ in tie} for tie in ties]
    sizes = [
        sum(math.prod(pruned[name].shape) for name in tied)
        for tied in names
        if tied <= pruned.keys()
    ]
    return TURNING * 4 * max(sizes, default=0)


def _held(weights: Mapping[str, Spec]) -> int:
    return sum(map(_bytes, weights.values()))


def _needed(lowered: Any) -> int:
    # Buffers are assigned before LLVM optimises.
    memory = lowered.compile(quick_options()).memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _bytes(spec: Spec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize
