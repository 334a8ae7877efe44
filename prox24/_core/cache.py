"""The folder of kernels and programs that are compiled once."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """PROX24_CACHE, or prox24 in XDG_CACHE_HOME, or ~/.cache/prox24; need not exist.

    Raises:
      RuntimeError: the user has no home folder, and the environment names none.
    """
    named, base = os.environ.get("PROX24_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named).absolute()  # dlopen looks elsewhere for a name without a folder.
    return (Path(base) if base else Path.home() / ".cache") / "prox24"
