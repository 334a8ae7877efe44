"""Settings of glibc's malloc, for short-lived arrays of megabytes."""

import os
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Makes glibc ask for pages of 2 MB: the kernel provides fewer pages, with the same peak memory."""
GIVE_BACK = "glibc.malloc.mmap_threshold=1048576"
"""Makes glibc return freed blocks of 1 MiB or more to the system.

By default glibc keeps freed blocks of up to 32 MB. They often do not fit the next array, and the
peak memory then depends on the sizes of earlier arrays.
"""


def start_with_settings() -> None:
    """Restarts this process once: glibc reads the settings before Python runs."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        own = "MALLOC_MMAP_THRESHOLD_" in os.environ
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES if own else f"{HUGE_PAGES}:{GIVE_BACK}"
        os.execv(sys.executable, sys.orig_argv)
