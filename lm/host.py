"""Settings of the host process that must stand before the process starts, and its heap."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Restart this process with malloc on transparent huge pages, where the system offers them.

    XLA:CPU allocates the temporaries of a step anew at every step. In 4 KiB pages that is 210,000
    page faults a step for a model of 8 million parameters (0.8 GB of temporaries), and an eighth
    of its time; in 2 MiB pages it is a few thousand. glibc reads the setting once, at start, so the
    program runs itself again, before anything was imported or opened; nothing happens if the
    setting is there already, is unknown to this libc, or the kernel has no huge pages.
    """
    old = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in old or not huge_pages_available():
        return
    os.environ["GLIBC_TUNABLES"] = f"{old}:{TUNABLE}" if old else TUNABLE
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def release_memory() -> None:
    """Give pages that malloc keeps for later back to the system, where it is glibc's.

    Arrays of a few megabytes come from the heaps of threads, which keep what was freed: after
    models have passed by in pieces that is hundreds of megabytes nobody uses.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def huge_pages_available() -> bool:
    """Whether this is Linux with glibc 2.35 or newer and transparent huge pages on request."""
    if sys.platform != "linux":
        return False
    try:
        mode = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        version = ctypes.CDLL(None).gnu_get_libc_version
        version.restype = ctypes.c_char_p
        major, minor = version().decode().split(".")[:2]
    except (OSError, AttributeError, ValueError):
        return False
    return "[madvise]" in mode and (int(major), int(minor)) >= (2, 35)
