"""The product on GPUs from Ampere on by cuSPARSELt, for a large batch.

No GPU has run it. It was compiled against the library, and a test runs it on a CPU with a stand-in
for the library.
"""

import importlib.metadata
from pathlib import Path

from jax import Array

from prox24.packed._codes import expand
from prox24.packed._kernels import native

PACKAGE, SHARED_OBJECT = "nvidia-cusparselt-cu13", "lib/libcusparseLt.so.0"


def installed() -> tuple[Path, str]:
    """The folder of the library and its release; raises NoKernelError if it is not installed."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    else:
        folder = Path(str(package.locate_file("nvidia/cu13")))
        if (folder / SHARED_OBJECT).exists():  # Releases before 0.10 have another folder.
            return folder, package.version
        found = f"of release {package.version}"
    raise native.NoKernelError(f"{PACKAGE} is {found}: pip install '{PACKAGE}>=0.10'")


def _flags() -> list[str]:
    folder, release = installed()
    headers = [f"-I{folder}/include", "-I/usr/local/cuda/include"]
    library = [f"{folder}/{SHARED_OBJECT}", f"-Wl,-rpath,{folder}/lib"]
    # Flags are part of the compiled file's name, and so the release is, too.
    release = f'-DPROX24_CUSPARSELT_RELEASE="{release}"'
    return ["-O2", *native.CPP_FLAGS, release, *headers, "-Wl,--no-as-needed", *library]


LIBRARY = native.Library(
    target="prox24_matmul_cusparselt",
    platform="CUDA",
    sources=("cusparselt.cc",),
    compilers=native.CPP_COMPILERS,
    flags=_flags,
)


def run(x: Array, values: Array, codes: Array) -> Array:
    """x W^T, see `prox24.packed._choice.Implementation`.

    XLA unpacks the weight, and the library compresses it, in every call.
    """
    return native.call(LIBRARY, x, expand(values, codes))
