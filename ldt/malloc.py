"""The C library's memory allocator, told what training is like."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
KEPT = 1 << 30
"""Blocks of up to so many bytes are kept for the next step when they are freed."""


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of returning it to the kernel; other C libraries are left alone.

    By default every tensor of more than 32 MB is made of new pages each time, which the kernel zeroes one by one: more
    work than what a step's copies do with them (BENCHMARKS.md). Larger blocks than `KEPT` still go back at once.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT)
        mallopt(M_TRIM_THRESHOLD, -1)
