"""Where what was built and measured for this machine is kept, and what it was made for."""

import errno
import functools
import hashlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path

FOLDER = "PROX24_CACHE"


def cache_folder() -> Path:
    """PROX24_CACHE, or prox24 in XDG_CACHE_HOME, or ~/.cache/prox24; need not exist.

    Raises:
      OSError: the user has no home folder, and the environment names none.
    """
    named = os.environ.get(FOLDER)
    if named:
        return Path(named).absolute()  # A library without a folder is looked for elsewhere.
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "prox24"
    try:
        return Path.home() / ".cache" / "prox24"
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "there is no home folder") from error


@functools.cache
def processor() -> str:
    """Model and instruction sets of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "CPU", "Features")
    told = {line.strip() for line in lines if line.startswith(wanted)}
    return "\n".join([platform.machine(), platform.processor(), *sorted(told)])


def available_processors() -> int:
    """How many logical processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Not on macOS and Windows.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def digest(parts: Iterable[str | bytes]) -> str:
    """Sixteen hexadecimal digits that differ where a part does.

    Example:
      >>> digest(["a", "bc"]) == digest(["ab", "c"])
      False
    """
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]
