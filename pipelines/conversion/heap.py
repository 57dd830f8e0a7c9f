"""Memory that a process has freed stays the process's, so that it is not asked for, and filled with zeros, over and over.

glibc gives large blocks back to the kernel when they are freed. A forward pass on the CPU frees and asks for the same few
megabytes hundreds of times, and each time the kernel hands out pages one by one: of a small model's passes that is a tenth.
Costs `KEPT_BYTES` of memory at most. Does nothing where the C library is another one.
"""

import ctypes

LARGEST_BYTES = 2**25
"""Larger blocks are still given back: the most that glibc takes here."""
KEPT_BYTES = 2**29
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of settings, as in malloc.h."""


def keep_freed_memory() -> None:
    """From now on, and for this process alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGEST_BYTES)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
