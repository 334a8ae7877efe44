"""The product on GPUs from Ampere on, by their sparse tensor cores, for a small batch.

It was compiled ahead of time, and what its threads hold was multiplied on a CPU; no GPU has run it.
`prox24 tune` leaves an implementation out that does not agree with the others on the machine.
"""

from jax import Array

from prox24.packed import native
from prox24.packed.implementation import Case, Implementation

DTYPES = ("float16", "bfloat16")
LARGEST_BATCH = 64
INPUTS = 64
"""A multiple of these is multiplied, see fragments.h."""
OUTPUTS = 16
"""Rows of the weight that threads take together."""


def run(x: Array, values: Array, codes: Array) -> Array:
    """x W^T, see `Implementation`; `serves` must have said yes.

    Args:
      x: (..., in).
      values: (out, in / 2).
      codes: (out, in / 32).
    """
    return native.call(native.CUDA, x, values, codes)


def serves(case: Case) -> bool:
    """Whether the kernel may run a case; builds it for the first that it may."""
    return (
        case.platform == "cuda"
        and case.dtype in DTYPES
        and case.inputs % INPUTS == 0
        and case.outputs % OUTPUTS == 0
        and 1 <= case.batch <= LARGEST_BATCH
        and case.outputs > 0
        and native.is_ready(native.CUDA)
    )


CUDA = Implementation(run, serves)
