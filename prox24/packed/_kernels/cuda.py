"""The product on GPUs from Ampere on, by their sparse tensor cores, for a small batch.

No GPU has run it. It was compiled, and a test multiplies on a CPU the numbers that its threads
hold.
"""

from collections.abc import Iterable

import jax
from jax import Array

from prox24.packed._kernels import native


def flags_for(capabilities: Iterable[str]) -> list[str]:
    """The compiler's flags for GPUs of compute capabilities such as "9.0"."""
    numbers = [capability.replace(".", "") for capability in capabilities]
    generated = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    return ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", *generated]


def _flags() -> list[str]:
    return flags_for(sorted({gpu.compute_capability for gpu in jax.local_devices(backend="cuda")}))


LIBRARY = native.Library(
    target="prox24_matmul_cuda",
    platform="CUDA",
    sources=("cuda.cu", "fragments.h"),
    compilers=("nvcc", "/usr/local/cuda/bin/nvcc"),
    flags=_flags,
)


def run(x: Array, values: Array, codes: Array) -> Array:
    """x W^T, see `prox24.packed._choice.Implementation`."""
    return native.call(LIBRARY, x, values, codes)
