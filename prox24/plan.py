"""What pruning a model takes, before it starts: bytes on the device, operations, hours."""

import functools
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prox24.calibration.gram import Sums, empty_gram
from prox24.calibration.layer import add_layer_inputs, layer_inputs
from prox24.core.pattern import PatternLike, Unstructured, as_pattern
from prox24.core.precision import PRECISION
from prox24.errors import Prox24Error
from prox24.forward import (
    Linear,
    Model,
    check_widths,
    input_widths,
    layer_function,
    layer_linears,
    micro_batches_of,
)
from prox24.models import decoder
from prox24.refine import BlockRefinement
from prox24.refine.blocks import block_step
from prox24.solvers.admm import ADMM
from prox24.solvers.damping import WIDEST_BLOCK
from prox24.solvers.problem import LayerProblem, corrected_weight
from prox24.solvers.solve import Refit, Solver, lower, solve

Spec = jax.ShapeDtypeStruct


class Method(NamedTuple):
    """What is done to every layer.

    Attributes:
      solver: see `prox24.solve`.
      refit: see `prox24.solve`.
      pattern: see `prox24.solve`.
      dtype: of the pruned weights; None for the checkpoint's.
      dense_targets: whether linears reproduce what the dense model puts out, which runs alongside.
      refinement: trains the layer afterwards; None does not.
      shard_grams: whether devices share the columns of Grams and weights, see `prune`.
    """

    solver: Solver
    refit: Refit | None
    pattern: PatternLike | Unstructured = (2, 4)
    dtype: np.dtype[Any] | None = None
    dense_targets: bool = False
    refinement: BlockRefinement | None = None
    shard_grams: bool = False

    @property
    def streams(self) -> int:
        """How many models' activations the Grams are of: with dense targets two."""
        return 2 if self.dense_targets else 1


class Memory(NamedTuple):
    """Bytes on a device while one layer is pruned.

    Attributes:
      weights: of the layer, once.
      grams: of its inputs, once.
      gather: the most while its Grams are gathered: weights, Grams and a micro-batch.
      solve: the most while a linear is solved: weights twice, Grams, and what the solver needs.
      widest: the linear that needs most.
    """

    weights: int
    grams: int
    gather: int
    solve: int
    widest: str


class Operations(NamedTuple):
    """Multiplications and additions of the whole model.

    Attributes:
      forward: two passes of the calibration tokens through every layer, or four with dense
        targets.
      grams: their Grams, and the cross-Grams.
      factor: of the Grams, for every linear.
      solve: steps of the solver and the refit, as products of each weight with its Gram.
    """

    forward: float
    grams: float
    factor: float
    solve: float

    def seconds(self, rate: float, devices: int, shard_grams: bool = False) -> dict[str, float]:
        """Of each part, at so many operations a second on each device.

        Devices factor each Gram by themselves. With `shard_grams` every part is divided, as if the
        devices divided every width.
        """
        alone = () if shard_grams else ("factor",)
        return {
            name: count / rate / (1 if name in alone else devices)
            for name, count in self._asdict().items()
        }


def layer_memory(
    model: Model, index: int, micro_batch: tuple[int, int], method: Method, devices: int = 1
) -> Memory:
    """Bytes that XLA's compiler reserves for the programs of one layer, which are not run.

    It is asked about one device. Where devices share columns, the bytes of each are estimated from
    its answer.

    Args:
      model: the model, of which nothing is read.
      index: of the layer.
      micro_batch: windows on one device and their length.
      method: what is done to the layer.
      devices: among which the rows of a weight, or the columns of Grams and weights, are divided,
        where they divide them.

    Raises:
      CheckpointError: a linear's input width is not divisible by M.
    """
    linears = layer_linears(model.config, index)
    check_widths(input_widths(linears), method.pattern)
    held = _held(_weights(model, index))
    pruned = _held(_pruned_weights(model, index, method))
    widths = _widths(linears).values()
    grams = sum(4 * width**2 // _sharing(width, method, devices) for width in widths)
    by_shape = {linear.shape: linear for linear in linears}
    solving = {linear.tensor: _solving(linear, method, devices) for linear in by_shape.values()}
    widest = max(solving, key=solving.__getitem__)
    sums = grams * method.streams
    return Memory(
        weights=held,
        grams=grams,
        gather=_gathering(model, index, micro_batch, method, devices),
        solve=held + pruned + sums + solving[widest],
        widest=widest,
    )


def fitting_micro_batch(
    model: Model, windows: tuple[int, int], method: Method, budget: int, devices: int = 1
) -> int:
    """The most windows that may go through a layer together within a budget of bytes a device.

    Args:
      model: the model, of which nothing is read, without a mesh.
      windows: their number and length.
      method: what is done to every layer.
      budget: bytes on each device.
      devices: a divisor of the windows.

    Returns:
      A divisor of the number of windows.

    Raises:
      Prox24Error: one window, or the solver, needs more.
      CalibrationError: there are too few windows for a refinement.
      CheckpointError: a linear's input width is not divisible by M.
    """
    count, length = windows
    whole = count // devices
    if method.refinement is not None:
        step = method.refinement.step_windows(count, length, devices)
        whole = step // devices
    most = whole

    def needed(index: int, size: int) -> int:
        return max(
            _gathering(model, index, (size, length), method, devices),
            refining_memory(model, index, (size, length), method, whole // size),
        )

    for index in distinct_layers(model):
        memory = layer_memory(model, index, (1, length), method._replace(refinement=None), devices)
        for name, bytes_needed in (
            (f"solving {memory.widest}", memory.solve),
            (f"one window in layer {index}", needed(index, 1)),
        ):
            if bytes_needed > budget:
                raise Prox24Error(
                    f"--memory is too small: {name} takes {bytes_needed / 2**30:.2f} GiB"
                )
        sizes = micro_batches_of(whole, most)
        most = next(size for size in sizes if needed(index, size) <= budget)
    return most * devices


def distinct_layers(model: Model) -> list[int]:
    """The first layer of each kind; equal ones have equal programs."""
    layers = model.config.layers
    return sorted({layer: index for index, layer in reversed(list(enumerate(layers)))}.values())


class SolverCost(NamedTuple):
    """What one linear costs, in products of a square weight with its Gram.

    Attributes:
      factor: for the Gram, whatever the number of rows.
      steps: for the rows.
    """

    factor: float
    steps: float


def operations(model: Model, tokens: int, cost: SolverCost, streams: int = 1) -> Operations:
    """Counts, with 2 for a multiplication and an addition; attention and norms are left out.

    Args:
      model: the model, of which nothing is read.
      tokens: of calibration.
      cost: of the method, see `solver_cost`.
      streams: see `Method`.
    """
    forward = grams = factor = solving = 0.0
    for index in range(len(model.config.layers)):
        linears = layer_linears(model.config, index)
        forward += sum(2.0 * math.prod(linear.shape) for linear in linears)
        grams += sum(2.0 * width**2 for width in _widths(linears).values())
        factor += sum(2.0 * linear.shape[1] ** 3 for linear in linears)
        solving += sum(2.0 * math.prod(linear.shape) * linear.shape[1] for linear in linears)
    return Operations(
        2 * streams * tokens * forward,
        streams * tokens * grams,
        cost.factor * factor,
        cost.steps * solving,
    )


def product_rate(size: int = 2048, repetitions: int = 5) -> float:
    """Operations per second of a float32 product of matrices at the highest precision, measured."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=PRECISION))
    return 2.0 * size**3 / _median_seconds(lambda: product(x, x), repetitions)


def solver_cost(method: Method, width: int = 1024) -> SolverCost:
    """What one linear costs, measured on random numbers with all rows and with a quarter of them.

    Dense targets add an inverse and two products.

    Args:
      method: whose solver and refit are run.
      width: inputs and outputs, or the next smaller number that the pattern divides.
    """
    if not isinstance(method.pattern, Unstructured):
        width -= width % as_pattern(method.pattern).group
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2 * width, width), np.float32)
    gram = jnp.asarray(inputs.T @ inputs)
    weight = jnp.asarray(rng.standard_normal((width, width), np.float32))
    product = jax.jit(lambda w, g: jnp.matmul(w, g, precision=PRECISION))
    one = _median_seconds(lambda: product(weight, gram), 5)

    def solving(rows: int) -> float:
        problem = LayerProblem(weight[:rows], gram)
        run = functools.partial(solve, problem, method.solver, method.refit, pattern=method.pattern)
        return _median_seconds(lambda: run().weight, 3) / one

    whole, quarter = solving(width), solving(width // 4)
    steps = min(max(0.0, (whole - quarter) * 4 / 3), whole)
    corrects = method.dense_targets
    return SolverCost(whole - steps + corrects, steps + 2 * corrects)


def _median_seconds(run: Any, repetitions: int) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _weights(model: Model, index: int) -> dict[str, Spec]:
    tensors, names = model.checkpoint.tensors, model.config.names
    return {
        name: Spec(shape, tensors[decoder.layer_tensor(names, index, name)].dtype)
        for name, shape in decoder.layer_shapes(model.config.layers[index]).items()
    }


def _pruned_weights(model: Model, index: int, method: Method) -> dict[str, Spec]:
    weights = _weights(model, index)
    if method.dtype is not None:
        for linear in layer_linears(model.config, index):
            weights[linear.weight] = Spec(linear.shape, method.dtype)
    return weights


def _widths(linears: Iterable[Linear]) -> dict[str, int]:
    return {linear.input: linear.shape[1] for linear in linears}


def _sharing(width: int, method: Method, devices: int) -> int:
    """How many devices share the columns of a Gram."""
    return devices if method.shard_grams and width % devices == 0 else 1


def _gathering(
    model: Model, index: int, micro_batch: tuple[int, int], method: Method, devices: int
) -> int:
    layer, widths = model.config.layers[index], _widths(layer_linears(model.config, index))
    weights, hidden = _weights(model, index), Spec((*micro_batch, layer.hidden), jnp.float32)
    sums: Sums = jax.eval_shape(lambda: {name: empty_gram(w) for name, w in widths.items()})
    alongside = (hidden, sums, sums) if method.dense_targets else (None, sums, {})
    needed = _needed(add_layer_inputs.lower(layer, weights, hidden, *alongside))
    if not method.shard_grams or devices == 1:
        return needed
    # A device has a part of what the Grams take, and the tokens that another one sends.
    streams = [hidden] * method.streams

    @jax.jit
    def run(weights: dict[str, Array], streams: list[Array]) -> list[dict[str, Array]]:
        return [layer_inputs(layer, weights, hidden) for hidden in streams]

    alone = _needed(run.lower(weights, streams))
    whole = sum(width**2 for width in widths.values())
    part = sum(width**2 / _sharing(width, method, devices) for width in widths.values()) / whole
    sent = 4 * math.prod(micro_batch) * max(widths.values()) * len(streams)
    return alone + int(max(0, needed - alone) * part) + sent


def _solving(linear: Linear, method: Method, devices: int) -> int:
    """Beside the Gram, and the cross-Gram."""
    outputs, width = linear.shape
    sharing = _sharing(width, method, devices)
    # What the devices do not divide is solved by each.
    rows = outputs if sharing > 1 or outputs % devices else outputs // devices
    gram = Spec((width, width), jnp.float32)
    problem = LayerProblem(Spec((rows, width), jnp.float32), gram)  # type: ignore[arg-type]
    program = lower(problem, method.solver, method.refit, pattern=method.pattern)
    needed = _needed(program) - _bytes(gram)
    if method.dense_targets:
        pull = Spec((), jnp.float32)
        corrected = _needed(corrected_weight.lower(*problem, gram, pull)) - 2 * _bytes(gram)
        needed = max(needed, corrected)
    if sharing == 1:
        return needed
    # Each holds a whole weight, for its product with a Gram, and the rows of a block of an inverse,
    # before and after the product with its pivot.
    inverts = isinstance(method.solver, ADMM) or method.dense_targets
    swept = 2 * min(WIDEST_BLOCK, width) if inverts else 0
    return needed // sharing + 4 * (outputs + swept) * width


def refining_memory(
    model: Model, index: int, micro_batch: tuple[int, int], method: Method, micro_batches: int
) -> int:
    """Bytes of all that is there while a layer is trained; 0 if it is not.

    Args:
      model: see `layer_memory`, and all that follow.
      index: of the layer.
      micro_batch: windows on one device and their length.
      method: what is done to the layer.
      micro_batches: of a step.
    """
    if method.refinement is None:
        return 0
    weights, layer = _pruned_weights(model, index, method), model.config.layers[index]
    hidden = Spec((*micro_batch, layer.hidden), jnp.float32)
    apply = layer_function(layer, None, method.refinement.compute_dtype)
    step = block_step(apply, weights, hidden, hidden, method.refinement, micro_batches)
    # The weights to begin with and the best ones are kept besides.
    return 2 * _held(weights) + _needed(step)


def _held(weights: Mapping[str, Spec]) -> int:
    return sum(map(_bytes, weights.values()))


def _needed(lowered: Any) -> int:
    memory = lowered.compile().memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _bytes(spec: Spec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize
