"""Keep freed memory in the process: page faults cost a fifth of a small step on a CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
_TRIM_THRESHOLD = 2**30


def keep_freed_memory() -> bool:
    """Ask glibc not to hand freed tensors back to the kernel; false where there is no glibc.

    Changes no result. Measured by ``benchmarks/cpu_levers.py``; see benchmarks/results.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    kept = mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
