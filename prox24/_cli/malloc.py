"""Settings of glibc's malloc, for short-lived arrays of megabytes."""

import ctypes
import os
import sys

M_MMAP_THRESHOLD = -3
"""The constant in glibc's malloc.h."""
HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Makes glibc ask for pages of 2 MB: the kernel provides fewer pages, with the same peak memory."""


def start_with_huge_pages() -> None:
    """Restarts this process once: glibc reads the setting before Python runs."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, sys.orig_argv)


def give_back_memory() -> None:
    """Makes glibc return freed blocks of 1 MiB or more to the system, where glibc is used.

    By default glibc keeps freed blocks of up to 32 MB. They often do not fit the next array, and
    the peak memory then depends on the sizes of earlier arrays.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)
