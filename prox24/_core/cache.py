"""The cache folder of compiled kernels and programs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """PROX24_CACHE, else prox24 in XDG_CACHE_HOME, else ~/.cache/prox24; it need not exist.

    Raises:
      RuntimeError: neither variable is set, and the user has no home folder.
    """
    named, base = os.environ.get("PROX24_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named).absolute()  # dlopen looks elsewhere for a name without a folder.
    return (Path(base) if base else Path.home() / ".cache") / "prox24"
