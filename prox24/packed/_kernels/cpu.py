"""The product on CPUs, by a kernel in C++ that reads every packed weight once for a small batch."""

import numpy as np
from jax import Array

from prox24.packed._kernels import native

INSTRUCTIONS = ("portable", "avx2", "avx512")
"""The forms of the kernel. Each has wider registers than the one before."""
LIBRARY = native.Library(
    target="prox24_matmul",
    platform="cpu",
    sources=("cpu.cc",),
    compilers=native.CPP_COMPILERS,
    flags=lambda: ["-O3", *native.CPP_FLAGS, "-pthread"],
)


def run(x: Array, values: Array, codes: Array, instructions: str = INSTRUCTIONS[-1]) -> Array:
    """x W^T, see `prox24.packed._choice.Implementation`.

    It takes the widest of `INSTRUCTIONS` that the CPU has, up to the named one.
    """
    widest = np.int32(INSTRUCTIONS.index(instructions))
    return native.call(LIBRARY, x, values, codes, instructions=widest)
