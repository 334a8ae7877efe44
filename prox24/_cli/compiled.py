"""Keeps the programs that XLA compiles for the next command."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
import warnings
from pathlib import Path

from prox24._core.cache import cache_folder

OFF = "PROX24_NO_COMPILATION_CACHE"
MOST_BYTES = 2**29
"""The most bytes of programs for one processor and one release of JAX."""
MOST_FOLDERS = 4


def keep_programs() -> None:
    """Lets JAX keep compiled programs in a folder of the cache, and read them from there.

    Each processor and each release of JAX has its own folder. So a machine never reads a program
    for another processor, even if machines share a home folder. Only the last used folders are
    kept. The function does nothing if no folder can be written, or if the user has set JAX's cache.
    """
    import jax

    if os.environ.get(OFF) or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        cache = cache_folder()
        folder = cache / f"compiled-{_key()}"
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
        _keep_latest(cache)
    except (OSError, RuntimeError):  # another process may delete a folder at the same time
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # A full disk or a damaged entry only costs a compilation. No warning is needed.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _keep_latest(cache: Path) -> None:
    folders = sorted(cache.glob("compiled-*"), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[:-MOST_FOLDERS]:
        shutil.rmtree(folder, ignore_errors=True)


def _key() -> str:
    """A name for the processor and the releases of JAX, for the folder of their programs."""
    releases = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
    said = repr([_processor(), platform.machine(), platform.system(), releases])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


@functools.cache
def _processor() -> str:
    """The model of the processor and its instruction sets."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Feat")))
    return platform.processor()
