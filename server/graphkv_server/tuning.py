"""Settings of the libraries below us that belong to the whole process, made once, before torch is loaded.

Measured with server and callers on two busy cores; an operator's own setting of the environment stands.
"""

import ctypes
import os

__all__ = ["tune_process"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_MMAP_THRESHOLD = 4 * 2**20
"""Messages stay below it: otherwise each one is a mmap, a storm of page faults and a munmap, half the transport's time."""
_TRIM_THRESHOLD = 16 * 2**20
"""Free memory at the top of the heap that is kept for the next messages; what is above goes back to the system."""
_ARENAS = 2
"""One arena a thread keeps freed messages in as many places; the loop and the engine are two threads that matter."""


def tune_process() -> None:
    """Sets what can be set; without effect on OpenMP once torch is loaded, and on malloc where it is not glibc's."""
    # A thread that waits for its share of a computation spins by default, and takes the core from the event loop: a call
    # took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for name, value in ((_M_MMAP_THRESHOLD, _MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _TRIM_THRESHOLD), (_M_ARENA_MAX, _ARENAS)):
        mallopt(name, value)
