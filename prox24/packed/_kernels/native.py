"""Builds kernels with the machine's compilers, keeps them in a cache folder, and loads them."""

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib.version
from jax import Array

from prox24._core.cache import cache_folder

logger = logging.getLogger("prox24.packed")
"""Logs once, in one line, why a kernel is not used. Its level can silence it."""
FOLDER = Path(__file__).parent
CPP_COMPILERS = ("g++", "clang++", "c++")
CPP_FLAGS = ("-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden")


class NoKernelError(Exception):
    """The kernel cannot be built."""


class Library(NamedTuple):
    """A kernel in another language, such as C++."""

    target: str  # The function's name, also for XLA.
    platform: str  # As XLA spells it.
    sources: tuple[str, ...]  # The compiled file, then the files that it includes.
    compilers: tuple[str, ...]  # The first installed one is used.
    flags: Callable[[], list[str]]  # For this machine; may raise NoKernelError.

    def command(self, compiler: str, output: Path) -> list[str]:
        """The command that compiles the kernel into a file."""
        source = str(FOLDER / self.sources[0])
        include = f"-I{jax.ffi.include_dir()}"
        return [compiler, *self.flags(), include, source, "-o", str(output)]

    def path(self, version: str) -> Path:
        """The file in the cache for these sources, flags and compiler, this machine and jaxlib."""
        made_for = [(FOLDER / source).read_text() for source in self.sources]
        made_for += [*self.flags(), version, platform.machine(), jaxlib.version.__version__]
        digest = hashlib.sha256(repr(made_for).encode()).hexdigest()[:16]
        try:
            return cache_folder() / f"{self.target}-{digest}.so"
        except RuntimeError as error:
            raise NoKernelError("there is no home folder; set PROX24_CACHE") from error


_loading = threading.Lock()


def problem(library: Library) -> str | None:
    """Why XLA cannot call a kernel, or None; the first call builds, loads and logs."""
    with _loading:  # XLA accepts the name of a function only once.
        return _load(library)


@functools.cache
def _load(library: Library) -> str | None:
    try:
        path = _built(library)
        try:
            target = jax.ffi.pycapsule(ctypes.CDLL(str(path))[library.target])
        except (OSError, AttributeError) as error:
            raise NoKernelError(f"delete {path}, which cannot be loaded: {error}") from error
    # JAX raises RuntimeError if there is no device of the platform.
    except (NoKernelError, OSError, RuntimeError) as error:
        found = f"{library.target} cannot run on {library.platform.upper()}: {error}"
        logger.warning(found)
        return found
    jax.ffi.register_ffi_target(library.target, target, platform=library.platform)
    return None


def call(library: Library, x: Array, *weight: Array, **attributes: Any) -> Array:
    """x W^T by a kernel without a `problem`, for x (..., in) and arrays of the weight (out, ...).

    The attributes have NumPy's types.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    outputs = len(weight[0])
    result = jax.ShapeDtypeStruct((len(flat), outputs), x.dtype)
    found = jax.ffi.ffi_call(library.target, result)(flat, *weight, **attributes)
    return found.reshape(*x.shape[:-1], outputs)


def _built(library: Library) -> Path:
    """The kernel's file, compiled unless the cache has it."""
    compiler = next(filter(None, map(shutil.which, library.compilers)), None)
    if compiler is None:
        raise NoKernelError(f"there is no compiler; install one of {', '.join(library.compilers)}")
    path = library.path(_output([compiler, "--version"]))
    if path.exists():
        return path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A temporary file in the same folder makes renaming atomic, so no process sees half of a file.
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".building")
    os.close(handle)
    partial = Path(name)
    try:
        _output(library.command(compiler, partial))
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # Half of a file would never be built again.
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
