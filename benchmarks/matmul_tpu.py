"""Compiles the product with packed weights for TPUs, without a TPU, and counts its bytes.

    pip install 'jax[tpu]' && python benchmarks/matmul_tpu.py

libtpu holds the compiler. Nothing is executed, so the table has no speed. The shapes are the
linears of Llama 8B and 70B. The bytes of a program are its arguments, its results, and its
temporaries twice. Cells are the bytes of the packed product over the bytes of XLA's product with a
dense weight. A dash is a case that the kernel does not compute.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import tpu_compiler
from common import show
from jax.sharding import SingleDeviceSharding
from matmul import SHAPES

from prox24.packed._choice import IMPLEMENTATIONS, Case
from prox24.packed._kernels import tpu, xla


def bytes_moved(function: Callable[..., Any], *arguments: Any) -> float:
    """The least bytes that a compiled program moves."""
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    outside = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return float(outside + 2 * memory.temp_size_in_bytes)


def main() -> None:
    """Compiles every case and prints a table."""
    rows = []
    for chip in tpu_compiler.CHIPS:
        sharding = SingleDeviceSharding(tpu_compiler.devices(chip)[0])
        array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        for dtype, (out, width) in itertools.product(("bfloat16", "float32"), SHAPES.values()):
            cells = []
            for batch in (1, 64):
                case = Case("tpu", dtype, out, width, batch)
                x, dense = array((batch, width), dtype), array((out, width), dtype)
                packed = array((out, width // 2), dtype), array((out, width // 32), "uint32")
                if IMPLEMENTATIONS["tpu"].problem(case) is not None:
                    cells.append("-")
                    continue
                ours, theirs = bytes_moved(tpu.run, x, *packed), bytes_moved(xla.multiply, x, dense)
                cells.append(f"{ours / theirs:.3f}")
            rows.append((chip, dtype, f"{out} x {width}", *cells))
    titles = "chip", "dtype", "weight", "batch 1", "batch 64"
    show(titles, rows, title=f"jax {jax.__version__}")


if __name__ == "__main__":
    main()
