"""Builds kernels with the machine's compilers, once for each machine, and loads them."""

import ctypes
import functools
import importlib.metadata
import logging
import math
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib.version
from jax import Array

from prox24.packed.cache import cache_folder, digest, processor

logger = logging.getLogger("prox24.packed")
"""Says, once and in one line, why a kernel is not used; silenced by its level."""


class Library(NamedTuple):
    """A kernel in a language of its own.

    Attributes:
      target: the function, and what XLA calls it.
      platform: on which it runs, as XLA spells it.
      source: the file, which is compiled.
      headers: files of its folder that it includes.
      compilers: of which the first that is there compiles it.
      flags: for any of them.
      machine: tells what the file is made for.
      machine_flags: for that.
    """

    target: str
    platform: str
    source: Path
    headers: tuple[Path, ...]
    compilers: tuple[str, ...]
    flags: tuple[str, ...]
    machine: Callable[[], list[str]]
    machine_flags: Callable[[Iterable[str]], list[str]]

    def command(self, compiler: str, library: Path, machine: Iterable[str]) -> list[str]:
        """What compiles it into a file, for what `machine` says or for another machine."""
        flags = [*self.flags, *self.machine_flags(machine), f"-I{jax.ffi.include_dir()}"]
        return [compiler, *flags, str(self.source), "-o", str(library)]

    def path(self, compiler: str) -> Path:
        """The file in the cache for these sources, compiler, machine and jaxlib, and for no other.

        Args:
          compiler: what it says of its version.
        """
        made_for: list[str | bytes] = [file.read_bytes() for file in (self.source, *self.headers)]
        made_for += [*self.flags, compiler, *self.machine(), jaxlib.version.__version__]
        return cache_folder() / f"{self.target}-{digest(made_for)}.so"


def _compute_capabilities() -> list[str]:
    """Of this process's GPUs, as "9.0"."""
    return sorted({gpu.compute_capability for gpu in jax.local_devices(backend="cuda")})


def _architectures(capabilities: Iterable[str]) -> list[str]:
    numbers = [capability.replace(".", "") for capability in capabilities]
    return [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]


def _cusparselt() -> list[str]:
    """The folder of the library's package, where those of CUDA's headers are, and its version."""
    try:
        package = importlib.metadata.distribution(CUSPARSELT_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    else:
        folder = Path(str(package.locate_file("nvidia/cu13")))
        if (folder / CUSPARSELT_LIBRARY).exists():  # Releases before 0.10 have another folder.
            return [str(folder), package.version]
        found = f"of release {package.version}"
    raise NoKernelError(f"{CUSPARSELT_PACKAGE} is {found}: pip install 'prox24[cusparselt]'")


def _linked_with(machine: Iterable[str]) -> list[str]:
    folder, _ = machine
    headers = [f"-I{folder}/include", "-I/usr/local/cuda/include"]
    library = [f"{folder}/{CUSPARSELT_LIBRARY}", f"-Wl,-rpath,{folder}/lib"]
    return [*headers, "-Wl,--no-as-needed", *library]


CUSPARSELT_PACKAGE, CUSPARSELT_LIBRARY = "nvidia-cusparselt-cu13", "lib/libcusparseLt.so.0"
FOLDER = Path(__file__).parent
CPU = Library(
    target="prox24_matmul",
    platform="cpu",
    source=FOLDER / "matmul_cpu.cc",
    headers=(),
    compilers=("g++", "clang++", "c++"),
    flags=("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"),
    machine=lambda: [processor()],
    machine_flags=lambda machine: [],
)
CUDA = Library(
    target="prox24_matmul_cuda",
    platform="CUDA",
    source=FOLDER / "matmul_cuda.cu",
    headers=(FOLDER / "fragments.h",),
    compilers=("nvcc", "/usr/local/cuda/bin/nvcc"),
    flags=("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"),
    machine=_compute_capabilities,
    machine_flags=_architectures,
)

CUSPARSELT = Library(
    target="prox24_matmul_cusparselt",
    platform="CUDA",
    source=FOLDER / "matmul_cusparselt.cc",
    headers=(),
    compilers=CPU.compilers,
    flags=("-O2", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"),
    machine=_cusparselt,
    machine_flags=_linked_with,
)

_loading = threading.Lock()


def is_ready(library: Library) -> bool:
    """Whether XLA may call a kernel, which the first call builds and loads; it logs why not."""
    with _loading:  # A target can be registered once.
        return _load(library)


@functools.cache
def _load(library: Library) -> bool:
    try:
        path = _built(library)
        try:
            target = jax.ffi.pycapsule(ctypes.CDLL(str(path))[library.target])
        except (OSError, AttributeError) as error:
            raise NoKernelError(f"delete {path}, which cannot be loaded: {error}") from error
    # A RuntimeError is JAX's, where there is no device of the platform.
    except (NoKernelError, OSError, RuntimeError) as error:
        logger.warning("%s is not used on %s: %s", library.target, library.platform.upper(), error)
        return False
    jax.ffi.register_ffi_target(library.target, target, platform=library.platform)
    return True


class NoKernelError(Exception):
    """The kernel cannot be built."""


def call(library: Library, x: Array, *weight: Array, **attributes: Any) -> Array:
    """x W^T by a kernel that `is_ready`, see `prox24.packed.implementation.Implementation`.

    Args:
      library: of the kernel.
      x: (..., in).
      weight: values (out, in / 2) and codes (out, in / 32), or what else the kernel takes of W, the
        first of shape (out, ...).
      attributes: of the kernel, of numpy's types.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    outputs = len(weight[0])
    result = jax.ShapeDtypeStruct((len(flat), outputs), x.dtype)
    found = jax.ffi.ffi_call(library.target, result)(flat, *weight, **attributes)
    return found.reshape(*x.shape[:-1], outputs)


def _built(library: Library) -> Path:
    """The file, compiled unless the cache has it."""
    compiler = next(filter(None, map(shutil.which, library.compilers)), None)
    if compiler is None:
        raise NoKernelError(f"there is no compiler; install one of {', '.join(library.compilers)}")
    path = library.path(_output([compiler, "--version"]))
    if path.exists():
        return path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Beside its place, so that the renaming is atomic and a process never sees half of a file.
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".building")
    os.close(handle)
    partial = Path(name)
    try:
        _output(library.command(compiler, partial, library.machine()))
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # Half of a library would never be built again.
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or ["no message"]
        telling = [line for line in lines if "error" in line or "fatal" in line]
        raise NoKernelError(f"{command[0]} failed: {(telling or lines)[0]}")
    return done.stdout
