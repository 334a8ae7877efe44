"""The product on CPUs, by a kernel in C++ that reads every packed weight once for a small batch."""

import numpy as np
from jax import Array

from prox24.packed import native
from prox24.packed.codes import ENTRIES_PER_WORD
from prox24.packed.implementation import Case, Implementation

DTYPES = ("float32", "bfloat16")
LARGEST_BATCH = 64
"""From there on a product is arithmetic, in which the kernel gains nothing."""
INSTRUCTIONS = ("portable", "avx2", "avx512")
"""The forms of the kernel, each with wider registers than the one before."""


def run(x: Array, values: Array, codes: Array, instructions: str = INSTRUCTIONS[-1]) -> Array:
    """x W^T, see `Implementation`; `serves` must have said yes.

    Args:
      x: (..., in).
      values: (out, in / 2).
      codes: (out, in / 32).
      instructions: one of `INSTRUCTIONS`, the widest that may be used if the CPU has them.
    """
    widest = np.int32(INSTRUCTIONS.index(instructions))
    return native.call(native.CPU, x, values, codes, instructions=widest)


def serves(case: Case) -> bool:
    """Whether the kernel may run a case; builds it for the first that it may."""
    return (
        case.platform == "cpu"
        and case.dtype in DTYPES
        and case.inputs % ENTRIES_PER_WORD == 0
        and 1 <= case.batch <= LARGEST_BATCH
        and case.outputs > 0
        and native.is_ready(native.CPU)
    )


CPU = Implementation(run, serves)
