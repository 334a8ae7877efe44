"""Compiles the pruning of a layer of Llama-3.1 for TPUs, without a TPU, and counts its memory.

    pip install 'jax[tpu]' && python benchmarks/layer_tpu.py

libtpu holds the compiler. Nothing is executed. The 8B model is compiled for one chip and for eight.
Eight chips share the windows of the text and the rows of weights. The models of 8B and 70B are also
compiled for eight chips that share the columns of weights and Grams.

The compiler reports arguments, results and temporaries of one chip. A result in a donated argument
counts once. The memory also includes the other arrays that `prox24.prune` holds on the chip. The
exit code is 1 if libtpu is missing, a program does not compile, or its memory is above 16 GB.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tpu_compiler
from common import LLAMAS, show
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prox24 import LayerProblem, Recipe
from prox24._core.placement import AXIS
from prox24._jobs.forward import run_layer
from prox24._jobs.observe import observe_layer
from prox24._models import spec
from prox24._models.families import config_from_hf
from prox24._pruning.grams import GramSum
from prox24._solvers.solve import solve_program

LIMIT = 16.0
LENGTH = 2048
RECIPE = Recipe()
CASES = [("8B", 1, "rows"), ("8B", 8, "rows"), ("8B", 8, "columns"), ("70B", 8, "columns")]
"""A model, the number of chips, and what of its weights they share."""


class Program(NamedTuple):
    """A jitted function, the shapes of its arguments, and the bytes of other arrays on the chip."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    held: float


def programs(config: dict[str, Any], mesh: Mesh, shared: str) -> Iterator[Program]:
    """The programs of a layer. The chips of a mesh share rows or columns."""

    def array(shape: tuple[int, ...], dtype: Any = jnp.float32, *axes: str) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    def rows(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        return array(shape, dtype, AXIS)

    def columns(shape: tuple[int, ...]) -> Any:
        return array(shape, jnp.float32, None, AXIS)

    layer = config_from_hf(config).layers[0]
    shapes = spec.layer_shapes(layer)
    inputs = spec.linear_inputs(layer)
    widths = {source: shapes[f"{name}.weight"][1] for name, source in inputs.items()}
    weights = {name: array(shape, jnp.bfloat16) for name, shape in shapes.items()}
    hidden = rows((mesh.size, LENGTH, layer.hidden))
    if shared == "rows":
        devices, weight, gram = None, rows, array
        total, tokens = lambda n: rows((mesh.size, n, n)), rows((mesh.size,), jnp.int32)
    else:
        devices, weight, gram = mesh.size, columns, columns
        total, tokens = lambda n: columns((n, n)), array((), jnp.int32)
    grams = {name: GramSum(total(n), total(n), tokens) for name, n in widths.items()}
    yield Program("layer", run_layer, (layer, weights, hidden), 0.0)
    observed = layer, weights, hidden, None, grams, {}, devices
    yield Program("layer and Grams", observe_layer, observed, 0.0)
    # The layer dense and pruned, and the Grams, of own targets; hidden states are on the host.
    held = 2 * 2 * sum(float(np.prod(shape)) for shape in shapes.values())
    gram_bytes = {n: 4 * n * n / (devices or 1) for n in widths.values()}
    held += sum(gram_bytes[n] for n in widths.values())
    methods = jax.tree.map(
        lambda x: array((), jnp.result_type(jnp.float32 if isinstance(x, float) else x)),
        (RECIPE.solver, RECIPE.refit),
    )
    for out, width in sorted({shapes[f"{name}.weight"] for name in inputs}):
        problem = LayerProblem(weight((out, width)), gram((width, width)))
        arguments = problem, *methods, array(()), RECIPE.pattern
        held_beside = held - gram_bytes[width]
        yield Program(f"solve, {out} x {width}", solve_program, arguments, held_beside)


def memory_of(compiled: Any, held: float) -> list[float]:
    """The GB of one chip: arguments, results, temporaries, what is held beside them, and all."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = memory.argument_size_in_bytes, results, memory.temp_size_in_bytes, held
    return [size / 1e9 for size in (*parts, sum(parts))]


def main() -> int:
    """Compiles every program, and prints a table."""
    rows, fits = [], True
    for chip, (model, count, shared) in itertools.product(tpu_compiler.CHIPS, CASES):
        mesh = Mesh(np.array(tpu_compiler.devices(chip)[:count]), (AXIS,))
        for program in programs(LLAMAS[model], mesh, shared):
            place = chip, model, str(count), shared, program.name
            try:
                compiled = program.function.lower(*program.arguments).compile()
            except jax.errors.JaxRuntimeError as error:
                print(*place, error, file=sys.stderr, sep=": ")
                fits = False
                continue
            sizes = memory_of(compiled, program.held)
            fits &= sizes[-1] <= LIMIT
            accessed = compiled.cost_analysis()["bytes accessed"] / 1e9
            rows.append((*place, *(f"{size:.2f}" for size in sizes), f"{accessed:.1f}"))
    titles = "arguments", "results", "temporary", "held beside", "in all", "GB accessed"
    named = "chip", "model", "chips", "shared", "program"
    show((*named, *titles), rows, f"Llama-3.1, GB of one chip, jax {jax.__version__}")
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
