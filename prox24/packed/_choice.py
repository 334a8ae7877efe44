"""The implementations of the product with a packed weight, and the choice between them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax import Array

from prox24.packed._kernels import cpu, cuda, cusparselt, native, tpu, xla

UNPACK = "unpack"
"""The implementation that computes every product: XLA unpacks the weight and multiplies."""
AUTO = "auto"


class Case(NamedTuple):
    """The facts about a product x W^T that an implementation depends on; W is (outputs, inputs)."""

    platform: str
    dtype: str
    outputs: int
    inputs: int
    batch: int


class Implementation(NamedTuple):
    """A way to compute some products.

    `run` takes x (..., in), values (out, in / 2) of the same dtype, and codes (out, words). It
    returns (..., out) of that dtype. It is traceable, and its sums are in float32.
    """

    run: Callable[[Array, Array, Array], Array]
    platform: str
    dtypes: tuple[str, ...]
    multiples: tuple[int, int, int]  # Divisors of outputs, inputs, batch.
    largest_batch: float = 64
    row_bytes: float = math.inf  # Maximal bytes of a dense row of W.
    library: native.Library | None = None  # It has to be built first.

    def problem(self, case: Case) -> str | None:
        """Why it cannot compute a product, or None; the first call builds its library."""
        sizes = case.outputs, case.inputs, case.batch
        if not (
            case.platform == self.platform
            and case.dtype in self.dtypes
            and all(n > 0 and n % of == 0 for n, of in zip(sizes, self.multiples, strict=True))
            and case.batch <= self.largest_batch
            and case.inputs * np.dtype(case.dtype).itemsize <= self.row_bytes
        ):
            multiples = "multiples of {} outputs, {} inputs and {} vectors".format(*self.multiples)
            limits = {"vectors": self.largest_batch, "bytes of a dense row": self.row_bytes}
            at_most = [f", at most {n} {of}" for of, n in limits.items() if n < math.inf]
            dtypes = " and ".join(self.dtypes)
            return f"it takes {dtypes} on {self.platform}, {multiples}{''.join(at_most)}"
        return native.problem(self.library) if self.library else None


SIXTEEN_BITS = ("float16", "bfloat16")
IMPLEMENTATIONS = {
    "cpu": Implementation(cpu.run, "cpu", ("float32", "bfloat16"), (1, 32, 1), library=cpu.LIBRARY),
    "cuda": Implementation(cuda.run, "cuda", SIXTEEN_BITS, (16, 64, 1), library=cuda.LIBRARY),
    "cusparselt": Implementation(
        cusparselt.run, "cuda", SIXTEEN_BITS, (16, 16, 8), math.inf, library=cusparselt.LIBRARY
    ),
    "tpu": Implementation(
        tpu.run,
        "tpu",
        ("float32", "bfloat16"),
        (tpu.OUTPUTS, tpu.INPUTS, 1),
        row_bytes=tpu.LARGEST_ROW,
    ),
}
"""All implementations but `UNPACK`."""
AUTOMATIC = {("cpu", "float32"): ("cpu", 64), ("cpu", "bfloat16"): ("cpu", 32)}
"""For a platform and a dtype: the implementation that `AUTO` runs, and its largest batch. Up to
this batch it was measured to be faster than `UNPACK` (docs/packed.md). No GPU and no TPU has run
the other kernels."""


def choose(implementation: str, case: Case) -> Callable[[Array, Array, Array], Array]:
    """The function that computes a product with the named implementation.

    `AUTO` takes the implementation of `AUTOMATIC` if it can compute the product, and `UNPACK` if
    not. Raises ValueError if a named implementation cannot compute the product.
    """
    if implementation == AUTO:
        name, largest_batch = AUTOMATIC.get((case.platform, case.dtype), (UNPACK, 0))
        usable = 0 < case.batch <= largest_batch and IMPLEMENTATIONS[name].problem(case) is None
        return IMPLEMENTATIONS[name].run if usable else xla.run
    if implementation == UNPACK:
        return xla.run
    problem = IMPLEMENTATIONS[implementation].problem(case)
    if problem is not None:
        raise ValueError(f"implementation {implementation!r} cannot compute {case}: {problem}")
    return IMPLEMENTATIONS[implementation].run
