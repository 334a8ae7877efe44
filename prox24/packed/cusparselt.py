"""The product on GPUs from Ampere on by cuSPARSELt, for a large batch.

It was compiled against the library, and run on a CPU with another that has its interface; no GPU
has run it. `prox24 tune` leaves an implementation out that does not agree with the others.
"""

from jax import Array

from prox24.packed import native
from prox24.packed.codes import expand
from prox24.packed.cuda import DTYPES
from prox24.packed.implementation import Case, Implementation

WEIGHT_MULTIPLE, BATCH_MULTIPLE = 16, 8
"""Of outputs and inputs, and of the batch, as the library has it for these dtypes."""


def run(x: Array, values: Array, codes: Array) -> Array:
    """x W^T, see `Implementation`; `serves` must have said yes.

    The weight is unpacked, and compressed by the library, in every call.

    Args:
      x: (..., in).
      values: (out, in / 2).
      codes: (out, in / 32).
    """
    return native.call(native.CUSPARSELT, x, expand(values, codes))


def serves(case: Case) -> bool:
    """Whether the library may run a case; builds what calls it for the first that it may."""
    return (
        case.platform == "cuda"
        and case.dtype in DTYPES
        and case.inputs % WEIGHT_MULTIPLE == 0
        and case.outputs % WEIGHT_MULTIPLE == 0
        and case.batch % BATCH_MULTIPLE == 0
        and 0 not in (case.outputs, case.inputs, case.batch)
        and native.is_ready(native.CUSPARSELT)
    )


CUSPARSELT = Implementation(run, serves)
