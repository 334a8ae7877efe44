"""Estimates the memory and the operations of pruning a model, before it starts."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.stages import Lowered

from prox24._checkpoints.checkpoint import DTYPES
from prox24._core.compiling import quick_options
from prox24._core.pattern import AnyPattern
from prox24._core.placement import divisors
from prox24._jobs import forward
from prox24._jobs.forward import Linear, Model
from prox24._jobs.observe import layer_inputs, observe_layer
from prox24._models import spec
from prox24._models.heads import attention_ties
from prox24._models.spec import Layer
from prox24._pruning.grams import Sums, empty_gram
from prox24._pruning.recipe import Recipe
from prox24._pruning.runner import check_found, check_widths
from prox24._solvers.damping import WIDEST_BLOCK
from prox24._solvers.problem import LayerProblem, corrected_weight
from prox24._solvers.solve import check_shares_columns, solve_program
from prox24.errors import Prox24Error
from prox24.refine._blocks import block_step

Spec = jax.ShapeDtypeStruct


class Memory(NamedTuple):
    """Bytes on a device while one layer is pruned.

    `weights` and `grams` are the sizes of one copy. `gather` is the peak while Grams are gathered:
    weights, Grams and a micro-batch. `solve` is the peak while a linear is solved: weights twice,
    Grams, and the memory of the solver. The solver needs the most for the linear `widest`.
    """

    weights: int
    grams: int
    gather: int
    solve: int
    widest: str


class Setup(NamedTuple):
    """The recipe and the devices, which share rows of weights; with `shard_grams`, columns."""

    recipe: Recipe
    devices: int = 1
    shard_grams: bool = False

    def sharing(self, width: int) -> int:
        """The number of devices that share the columns of a Gram."""
        return self.devices if self.shard_grams and width % self.devices == 0 else 1

    def rows(self, shape: tuple[int, ...]) -> int:
        """The number of rows that a device solves; all rows if the devices do not share them."""
        outputs, width = shape
        shared = self.sharing(width) == 1 and outputs % self.devices == 0
        return outputs // self.devices if shared else outputs


def checked_setup(model: Model, recipe: Recipe, devices: int, shard_grams: bool) -> Setup:
    """The setup; raises an error if a pattern does not fit, or if Grams cannot be shared."""
    check_fits(model, recipe, shard_grams)
    if shard_grams and devices == 1:
        raise Prox24Error("shard_grams is for several devices, and there is one to be used")
    return Setup(recipe, devices, shard_grams)


def check_fits(model: Model, recipe: Recipe, shard_grams: bool) -> None:
    """Raises an error if a recipe does not fit the model, or cannot share Grams."""
    if shard_grams:
        check_shares_columns(recipe.solver, recipe.refit)
    widths = {linear.tensor: linear.shape[1] for linear in forward.all_linears(model.config)}
    check_found(widths, recipe)
    check_widths(widths, recipe)


def layer_memory(model: Model, index: int, micro_batch: tuple[int, int], setup: Setup) -> Memory:
    """Bytes that XLA's compiler reserves for the programs of one layer, without running them.

    The programs are compiled for one device and a micro-batch of shape (windows, length). If
    devices share columns, the bytes of each device are estimated from this result.
    """
    linears = _pruned_linears(model, index, setup.recipe)
    held = _held(_weights(model, index))
    pruned = _held(_weights(model, index, setup.recipe.dtype))
    grams = sum(4 * width**2 // setup.sharing(width) for width in _widths(linears).values())
    largest = _largest(linears, setup)
    # XLA compiles the programs in threads, while Python traces the next one.
    with ThreadPoolExecutor() as pool:
        compiled = {
            linear: [pool.submit(_needed, program) for program in _programs(linear, setup)]
            for linear in largest
        }
        gather = _gathering(model, index, micro_batch, setup)
    solving = {
        linear.tensor: _on_a_device(linear, [program.result() for program in programs], setup)
        for linear, programs in compiled.items()
    }
    widest = max(solving, key=solving.__getitem__, default="")
    turning = _turning(model, index, setup.recipe)
    return Memory(
        weights=held,
        grams=grams,
        gather=gather,
        solve=held + pruned + grams * streams(setup.recipe) + max(solving.get(widest, 0), turning),
        widest=widest,
    )


def fitting_micro_batch(model: Model, windows: tuple[int, int], setup: Setup, budget: int) -> int:
    """The largest micro-batch, in windows, within a budget of bytes for each device.

    `windows` is the shape (count, length); the number of devices divides the count. The result
    divides the count too. Raises Prox24Error if the solver or one window exceeds the budget.
    """
    (count, length), devices, refine = windows, setup.devices, setup.recipe.refine
    whole = count // devices
    if refine is not None:
        whole = refine.step_windows(count, length, devices) // devices
    most = whole

    @functools.cache
    def needed(index: int, size: int) -> int:
        gathering = _gathering(model, index, (size, length), setup)
        refining = refining_memory(model, index, (size, length), setup.recipe, whole // size)
        return max(gathering, refining)

    for index in distinct_layers(model, setup.recipe):
        memory = layer_memory(model, index, (1, length), setup)
        for name, bytes_needed in (
            (f"solving {memory.widest}", memory.solve),
            (f"one window in layer {index}", needed(index, 1)),
        ):
            if bytes_needed > budget:
                raise Prox24Error(
                    f"memory is too small: {name} takes {math.ceil(bytes_needed / 1e6)}MB"
                )
        sizes = divisors(whole, most)
        most = next(size for size in sizes if needed(index, size) <= budget)
    return most * devices


def distinct_layers(model: Model, recipe: Recipe) -> list[int]:
    """The first layer of each kind; equal layers with equal patterns have equal programs."""

    def kind(index: int) -> tuple[Layer, tuple[AnyPattern | None, ...]]:
        linears = forward.layer_linears(model.config, index)
        return model.config.layers[index], tuple(recipe.pattern_of(own.tensor) for own in linears)

    layers = reversed(range(len(model.config.layers)))
    return sorted({kind(index): index for index in layers}.values())


def operations(model: Model, tokens: int, recipe: Recipe) -> dict[str, float]:
    """Counts of multiplications and additions, without attention, norms and the solver.

    "forward" counts the passes through every layer: two, or three if the dense model runs too.
    "grams" counts Grams and cross-Grams.
    """
    passes = grams = 0.0
    for index in range(len(model.config.layers)):
        linears = forward.layer_linears(model.config, index)
        passes += sum(2.0 * math.prod(linear.shape) for linear in linears)
        pruned = _widths(_pruned_linears(model, index, recipe))
        grams += sum(2.0 * width**2 for width in pruned.values())
    alongside = recipe.targets is not None or recipe.refine is not None
    return {
        "forward": (2 + alongside) * tokens * passes,
        "grams": streams(recipe) * tokens * grams,
    }


def streams(recipe: Recipe) -> int:
    """The number of models with activations for Grams: two with dense targets, else one."""
    return 1 if recipe.targets is None else 2


def _weights(model: Model, index: int, dtype: str | None = None) -> dict[str, Spec]:
    """The tensors of a layer in their own dtypes; linears in `dtype` if it is given."""
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
    # A device has a part of the memory of the Grams, and the tokens from another device.
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
    """The linears that may need the most memory: with more entries and wider Grams than others."""
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


def _programs(linear: Linear, setup: Setup) -> Iterator[Lowered]:
    """The programs that solve a linear.

    The first program solves, with one Gram as an argument. With dense targets, the second one
    corrects the weight before, with two.
    """
    recipe, width, damping = setup.recipe, linear.shape[1], Spec((), jnp.float32)
    weight = Spec((setup.rows(linear.shape), width), jnp.float32)
    gram = Spec((width, width), jnp.float32)
    problem: Any = LayerProblem(weight, gram)  # type: ignore[arg-type]
    pattern = recipe.pattern_of(linear.tensor)
    assert pattern is not None
    yield solve_program.lower(problem, recipe.solver, recipe.refit, damping, pattern=pattern)
    if recipe.targets is not None:
        yield corrected_weight.lower(*problem, gram, damping)


def _on_a_device(linear: Linear, programs: Iterable[int], setup: Setup) -> int:
    """Bytes on a device for `_programs` without their Grams, from the bytes on one device."""
    (outputs, width), recipe = linear.shape, setup.recipe
    needed = max(size - 4 * count * width**2 for count, size in enumerate(programs, 1))
    sharing = setup.sharing(width)
    if sharing == 1:
        return needed
    # Each device holds a whole weight, for its product with a Gram. It also holds the rows of a
    # block of an inverse, before and after the product with the block's pivot.
    inverts = recipe.solver.needs_definite or recipe.targets is not None
    swept = 2 * min(WIDEST_BLOCK, width) if inverts else 0
    return needed // sharing + 4 * (outputs + swept) * width


def refining_memory(
    model: Model, index: int, micro_batch: tuple[int, int], recipe: Recipe, micro_batches: int
) -> int:
    """Bytes in memory while a layer is trained by steps of micro-batches; 0 if it is not."""
    if recipe.refine is None:
        return 0
    weights, layer = _weights(model, index, recipe.dtype), model.config.layers[index]
    hidden = Spec((*micro_batch, layer.hidden), jnp.float32)
    apply = forward.layer_function(layer, None, recipe.refine.compute_dtype)
    step = block_step(apply, weights, hidden, hidden, recipe.refine, micro_batches)
    # The first weights and the best weights are also in memory.
    return 2 * _held(weights) + _needed(step)


TURNING = 8
"""The memory to learn one basis, in copies of its weights; a test compares it with XLA's figure."""


def _turning(model: Model, index: int, recipe: Recipe) -> int:
    """Bytes to learn a basis, without weights and Grams."""
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
    return sum(own.size * own.dtype.itemsize for own in weights.values())


def _needed(lowered: Lowered) -> int:
    # Quick options suffice: XLA assigns buffers before LLVM optimises.
    memory: Any = lowered.compile(quick_options()).memory_analysis()  # type: ignore[arg-type]
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
