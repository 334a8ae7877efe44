"""Keeps the programs that XLA compiles for the next command."""

import contextlib
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
    releases = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
    key = repr([_processor(), platform.machine(), platform.system(), releases])
    try:
        cache = cache_folder()
        folder = cache / f"compiled-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
        folders = sorted(cache.glob("compiled-*"), key=lambda folder: folder.stat().st_mtime)
        for old in folders[:-MOST_FOLDERS]:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError):  # another process may delete a folder at the same time
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # A full disk or a damaged entry only costs a compilation. No warning is needed.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _processor() -> str:
    """The model of the processor and its instruction sets."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Feat")))
    return platform.processor()
