"""Settings of glibc's malloc, for arrays of megabytes that come and go."""

import ctypes
import os
import sys

M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""
HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Has glibc ask for pages of 2 MB, of which the kernel hands out fewer. Peaks stay the same."""


def start_with_huge_pages() -> None:
    """Starts this process anew, once: glibc reads the setting before Python runs."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, sys.orig_argv)


def give_back_memory() -> None:
    """Has glibc, where it is, give back what is freed of 1 MiB or more.

    By itself it comes to keep pieces of up to 32 MB that often do not fit the next array, and the
    peak of memory then depends on the sizes that went before.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)
