"""Builds the kernel for CPUs with the system's compiler, once for each machine, and loads it."""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jaxlib.version

from prox24.packed.cache import cache_folder, digest, processor

TARGET = "prox24_matmul"
SOURCE = Path(__file__).with_name("matmul_cpu.cc")
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")

logger = logging.getLogger("prox24.packed")
"""Says, once and in one line, why the kernel is not used; silenced by its level."""


_loading = threading.Lock()


def is_ready() -> bool:
    """Whether XLA may call the kernel, which the first call builds and loads; it logs why not."""
    with _loading:  # A target can be registered once.
        return _load()


@functools.cache
def _load() -> bool:
    try:
        path = _built()
        try:
            target = jax.ffi.pycapsule(ctypes.CDLL(str(path))[TARGET])
        except (OSError, AttributeError) as error:
            raise NoKernelError(f"delete {path}, which cannot be loaded: {error}") from error
    except (NoKernelError, OSError) as error:
        logger.warning("no kernel for CPUs, XLA multiplies instead: %s", error)
        return False
    jax.ffi.register_ffi_target(TARGET, target, platform="cpu")
    return True


class NoKernelError(Exception):
    """The kernel cannot be built."""


def library_path(compiler: str) -> Path:
    """The file in the cache for this source, compiler, CPU and jaxlib, and for no other.

    Args:
      compiler: what it says of its version.
    """
    made_for = (SOURCE.read_bytes(), *FLAGS, compiler, processor(), jaxlib.version.__version__)
    return cache_folder() / f"{TARGET}-{digest(made_for)}.so"


def _built() -> Path:
    """The library, compiled unless the cache has it."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise NoKernelError(f"there is no compiler; install one of {', '.join(COMPILERS)}")
    path = library_path(_output([compiler, "--version"]))
    if path.exists():
        return path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Beside its place, so that the renaming is atomic and a process never sees half of a file.
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".building")
    os.close(handle)
    partial = Path(name)
    try:
        headers = f"-I{jax.ffi.include_dir()}"
        _output([compiler, *FLAGS, headers, str(SOURCE), "-o", str(partial)])
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # Half of a library would never be built again.
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise NoKernelError(f"{command[0]} failed: {lines[0]}")
    return done.stdout
