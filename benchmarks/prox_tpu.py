"""Compiles the 2:4 proximal operator for TPUs, without a TPU, and counts the bytes it moves.

    pip install libtpu && python benchmarks/prox_tpu.py

libtpu holds the compiler; nothing is executed. "Accessed" is what XLA's cost analysis sums over
the program: every operand and result of every instruction, those in on-chip memory included. "HBM"
sums those that the compiler did not place in on-chip memory. Ratios are to the least: read the
input once and write the output once.
"""

import functools
import itertools
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tpu_compiler
from common import show
from jax.sharding import SingleDeviceSharding

import prox24
from prox24 import planes

ROWS = COLUMNS = 4096
LAM = 0.3


class Program(NamedTuple):
    """A function and the shapes and dtypes of its arguments."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]


def programs() -> list[Program]:
    """The copy, the interleaved form in two dtypes, and the planar form."""

    def array(columns: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((ROWS, columns), dtype)

    def prox(y: jax.Array) -> jax.Array:
        return prox24.prox(y, LAM)

    def prox_planes(*y: jax.Array) -> Any:
        return planes.prox(y, LAM)

    return [
        Program("copy, float32", lambda y: y * 1.5, (array(COLUMNS, jnp.float32),)),
        Program("prox24.prox, float32", prox, (array(COLUMNS, jnp.float32),)),
        Program("prox24.prox, bfloat16", prox, (array(COLUMNS, jnp.bfloat16),)),
        Program(
            "prox24.planes.prox, float32", prox_planes, (array(COLUMNS // 4, jnp.float32),) * 4
        ),
    ]


def compile_for(program: Program, device: Any) -> Any:
    """The program, compiled ahead of time for one device that need not exist."""
    placed = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    arguments = [placed(each.shape, each.dtype) for each in program.arguments]
    return jax.jit(program.function).lower(*arguments).compile()


# Instructions that move nothing, or whose bytes belong to the instruction that started them.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done"}
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "s16": 2, "s8": 1, "u8": 1, "pred": 1}


def hbm_bytes(text: str) -> int:
    """Bytes that the entry computation of an optimized program reads from and writes to HBM."""

    def off_chip(shape: str) -> list[int]:
        arrays = re.findall(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?", shape)
        return [
            0
            if "S(1)" in layout
            else BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims, layout in arrays
        ]

    total, results = 0, {}
    for line in text[text.index("\nENTRY") :].splitlines():
        found = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:,|$)", line)
        if found is None:
            continue
        name, shape, operation, operands = found.groups()
        results[name] = off_chip(shape)
        if operation not in FREE:
            # The result of a start also names its source.
            written = results[name][:1] if operation.endswith("-start") else results[name]
            read = [n for operand in re.findall(r"%([\w.\-]+)", operands) for n in results[operand]]
            total += sum(written) + sum(read)
    return total


def ratios(program: Program, compiled: Any) -> list[str]:
    """Bytes accessed, and those in HBM, over the least."""
    least = 2 * sum(each.size * each.dtype.itemsize for each in program.arguments)
    moved = compiled.cost_analysis()["bytes accessed"], hbm_bytes(compiled.as_text())
    return [f"{count / least:.2f}" for count in moved]


def main() -> int:
    if not tpu_compiler.is_installed():
        return 2
    rows = []
    for chip, program in itertools.product(tpu_compiler.CHIPS, programs()):
        compiled = compile_for(program, tpu_compiler.devices(chip)[0])
        rows.append((chip, program.name, *ratios(program, compiled)))
    title = f"{ROWS} x {COLUMNS}, jax {jax.__version__}"
    show(("chip", "program", "accessed", "HBM"), rows, left=2, title=title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
