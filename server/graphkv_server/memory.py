"""How this process's C allocator treats message-sized memory; settings of the whole process, made once at start.

Knows glibc alone; elsewhere it does nothing.
"""

import ctypes

__all__ = ["tune_allocator"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_MMAP_THRESHOLD = 8 * 2**20
"""Messages stay below it: otherwise each one is a mmap, a storm of page faults and a munmap, half the transport's time."""
_TRIM_THRESHOLD = 32 * 2**20
"""Free memory at the top of the heap that is kept for the next messages; what is above goes back to the system."""
_ARENAS = 2
"""One arena a thread keeps freed messages in as many places; the loop and the engine are two threads that matter."""


def tune_allocator() -> bool:
    """Sets glibc's thresholds; says whether it could."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _TRIM_THRESHOLD), (_M_ARENA_MAX, _ARENAS))
    outcomes = [mallopt(name, value) for name, value in settings]
    return all(outcomes)
