"""What pruning a model takes, before it starts: bytes on the device, operations, hours."""

import functools
import math
import statistics
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prox24.calibration.gram import Sums, add_layer_inputs, empty_gram
from prox24.core.pattern import PatternLike, Unstructured
from prox24.core.precision import PRECISION
from prox24.errors import Prox24Error
from prox24.forward import (
    Linear,
    Model,
    check_widths,
    input_widths,
    layer_linears,
    micro_batches_of,
)
from prox24.models import decoder
from prox24.solvers.problem import LayerProblem
from prox24.solvers.solve import Refit, Solver, lower, solve

Spec = jax.ShapeDtypeStruct


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
      forward: two passes of the calibration tokens through every layer.
      grams: their Grams.
      solve: steps of the solver and the refit, as products of each weight with its Gram.
    """

    forward: float
    grams: float
    solve: float


def layer_memory(
    model: Model,
    index: int,
    micro_batch: tuple[int, int],
    solver: Solver,
    refit: Refit | None,
    pattern: PatternLike | Unstructured = (2, 4),
    devices: int = 1,
    dtype: np.dtype[Any] | None = None,
) -> Memory:
    """Bytes that XLA's compiler reserves for the programs of one layer, which are not run.

    Args:
      model: the model, of which nothing is read.
      index: of the layer.
      micro_batch: windows on one device and their length.
      solver: see `prox24.solve`.
      refit: see `prox24.solve`.
      pattern: see `prox24.solve`.
      devices: among which the rows of a weight are divided.
      dtype: of the pruned weights; None for the checkpoint's.
    """
    linears = layer_linears(model.config, index)
    check_widths(input_widths(linears), pattern)
    weights = _weights(model, index)
    held = sum(map(_bytes, weights.values()))
    if dtype is not None:
        names = {linear.weight for linear in linears}
        weights |= {name: Spec(weights[name].shape, dtype) for name in names}
    pruned = sum(map(_bytes, weights.values()))
    grams = sum(4 * width**2 for width in _widths(linears).values())
    by_shape = {linear.shape: linear for linear in linears}
    solving = {
        linear.tensor: _solving(linear, solver, refit, pattern, devices)
        for linear in by_shape.values()
    }
    widest = max(solving, key=solving.__getitem__)
    gather = _gathering(model, index, micro_batch)
    return Memory(held, grams, gather, held + pruned + grams + solving[widest], widest)


def fitting_micro_batch(
    model: Model,
    windows: tuple[int, int],
    solver: Solver,
    refit: Refit | None,
    budget: int,
    pattern: PatternLike | Unstructured = (2, 4),
    dtype: np.dtype[Any] | None = None,
) -> int:
    """The most windows that may go through a layer together within a budget of bytes a device.

    Args:
      model: the model, of which nothing is read.
      windows: their number and length.
      solver: see `prox24.solve`.
      refit: see `prox24.solve`.
      budget: bytes on each device of the model's mesh.
      pattern: see `prox24.solve`.
      dtype: of the pruned weights; None for the checkpoint's.

    Returns:
      A divisor of the number of windows.

    Raises:
      Prox24Error: one window, or the solver, needs more.
      CheckpointError: a linear's input width is not divisible by M.
    """
    devices = 1 if model.mesh is None else model.mesh.size
    share, length = windows[0] // devices, windows[1]
    most = share
    for index in distinct_layers(model):
        memory = layer_memory(model, index, (1, length), solver, refit, pattern, devices, dtype)
        for name, needed in (
            (f"solving {memory.widest}", memory.solve),
            (f"one window in layer {index}", memory.gather),
        ):
            if needed > budget:
                raise Prox24Error(f"--memory is too small: {name} takes {needed / 2**30:.2f} GiB")
        sizes = micro_batches_of(share, most)
        most = next(size for size in sizes if _gathering(model, index, (size, length)) <= budget)
    return most * devices


def distinct_layers(model: Model) -> list[int]:
    """The first layer of each kind; equal ones have equal programs."""
    layers = model.config.layers
    return sorted({layer: index for index, layer in reversed(list(enumerate(layers)))}.values())


def operations(model: Model, tokens: int, steps: float) -> Operations:
    """Counts, with 2 for a multiplication and an addition; attention and norms are left out.

    Args:
      model: the model, of which nothing is read.
      tokens: of calibration.
      steps: of the solver and the refit together.
    """
    forward = grams = solving = 0.0
    for index in range(len(model.config.layers)):
        linears = layer_linears(model.config, index)
        forward += sum(2.0 * math.prod(linear.shape) for linear in linears)
        grams += sum(2.0 * width**2 for width in _widths(linears).values())
        solving += sum(2.0 * math.prod(linear.shape) * linear.shape[1] for linear in linears)
    return Operations(2 * tokens * forward, tokens * grams, steps * solving)


def product_rate(size: int = 2048, repetitions: int = 5) -> float:
    """Operations per second of a float32 product of matrices at the highest precision, measured."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=PRECISION))
    return 2.0 * size**3 / _median_seconds(lambda: product(x, x), repetitions)


def solver_steps(
    solver: Solver,
    refit: Refit | None,
    pattern: PatternLike | Unstructured = (2, 4),
    shape: tuple[int, int] = (1024, 1024),
) -> float:
    """What one linear costs, in products of its weight with its Gram, measured on random numbers.

    Args:
      solver: see `prox24.solve`.
      refit: see `prox24.solve`.
      pattern: see `prox24.solve`.
      shape: of the weight.
    """
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2 * shape[1], shape[1]), np.float32)
    weight = jnp.asarray(rng.standard_normal(shape, np.float32))
    problem = LayerProblem(weight, jnp.asarray(inputs.T @ inputs))
    product = jax.jit(lambda w, g: jnp.matmul(w, g, precision=PRECISION))
    one = _median_seconds(lambda: product(*problem), 5)
    return _median_seconds(lambda: solve(problem, solver, refit, pattern=pattern).weight, 1) / one


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


def _widths(linears: Iterable[Linear]) -> dict[str, int]:
    return {linear.input: linear.shape[1] for linear in linears}


def _gathering(model: Model, index: int, micro_batch: tuple[int, int]) -> int:
    layer, widths = model.config.layers[index], _widths(layer_linears(model.config, index))
    hidden = Spec((*micro_batch, layer.hidden), jnp.float32)
    sums: Sums = jax.eval_shape(lambda: {name: empty_gram(w) for name, w in widths.items()})
    weights = _weights(model, index)
    return _needed(add_layer_inputs.lower(layer, weights, hidden, None, sums, {}))


def _solving(
    linear: Linear,
    solver: Solver,
    refit: Refit | None,
    pattern: PatternLike | Unstructured,
    devices: int,
) -> int:
    """Beside the Gram."""
    rows, width = -(-linear.shape[0] // devices), linear.shape[1]
    program = functools.partial(lower, solver=solver, refit=refit, pattern=pattern)
    weight, gram = Spec((rows, width), jnp.float32), Spec((width, width), jnp.float32)
    return _needed(program(LayerProblem(weight, gram))) - _bytes(gram)  # type: ignore[arg-type]


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
