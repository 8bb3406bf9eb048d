"""Pooled host memory for arriving layers: page-aligned, reused, and pinned where the device is a GPU.

Fresh memory costs a page fault every 4 KiB, nearly as much as receiving the bytes; so a buffer that comes back is kept
and lent again. What is lent and what is kept together stay within the pool's bound. A buffer's old content may be
another caller's: whoever borrows one writes every byte before anything reads it (the assembler counts).

Knows no call and no shape; not safe to use from several threads.
"""

import mmap
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["Buffer", "BufferPool", "Bytes", "Pinning"]

_STEP_BITS = 4
"""Sizes are rounded up to one of 2^4 between powers of two, so that a returned buffer fits the next layer: at most 1/16
is wasted, and the system gives no page for what is never written."""

Bytes = npt.NDArray[np.uint8]


class Pinning:
    """How memory is made fit for fast copies to a GPU: not at all here; `engine.transfers` has CUDA's way."""

    def pin(self, memory: Bytes) -> None:
        """Called once when a buffer is made."""

    def unpin(self, memory: Bytes) -> None:
        """Called once before a buffer's memory goes back to the system."""


class Buffer:
    """uint8 `memory` of at least the size asked for; its pages are touched only when written."""

    __slots__ = ("_mapping", "memory", "size_class")

    def __init__(self, size_class: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._mapping = mmap.mmap(-1, size_class, flags=flags)
        self.memory: Bytes = np.frombuffer(self._mapping, np.uint8)
        self.size_class = size_class


class BufferPool:
    """Lends buffers. `bound`: bytes that lent and kept buffers may hold together; kept ones make room for lent ones.

    The bound on what is lent is admission's; the pool itself never refuses.
    """

    def __init__(self, bound: int, *, pinning: Pinning | None = None, make: Callable[[int], Buffer] = Buffer) -> None:
        self._bound = bound
        self._pinning = pinning or Pinning()
        self._make = make
        self._kept: OrderedDict[int, Buffer] = OrderedDict()  # by id, the longest unused first
        self._kept_bytes = 0
        self._lent_bytes = 0

    @property
    def lent_bytes(self) -> int:
        """Bytes of buffers that have not come back."""
        return self._lent_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of buffers that wait to be lent again."""
        return self._kept_bytes

    def take(self, size: int) -> Buffer:
        """A buffer of at least `size` bytes whose content is arbitrary."""
        wanted = _size_class(size)
        self._lent_bytes += wanted
        for key in reversed(self._kept):  # the latest first: its pages are the likeliest to be in a cache
            if self._kept[key].size_class == wanted:
                self._kept_bytes -= wanted
                return self._kept.pop(key)
        self._shrink_to(self._bound - self._lent_bytes)
        buffer = self._make(wanted)
        self._pinning.pin(buffer.memory)
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        """Ends a loan; nothing may use the buffer's memory any more."""
        self._lent_bytes -= buffer.size_class
        self._kept[id(buffer)] = buffer
        self._kept_bytes += buffer.size_class
        self._shrink_to(self._bound - self._lent_bytes)

    def close(self) -> None:
        """Returns the kept buffers to the system."""
        self._shrink_to(0)

    def _shrink_to(self, size: int) -> None:
        while self._kept and self._kept_bytes > size:
            _, buffer = self._kept.popitem(last=False)
            self._kept_bytes -= buffer.size_class
            self._pinning.unpin(buffer.memory)  # the mapping goes with its last reference


def _size_class(size: int) -> int:
    """`size` rounded up to the next step between powers of two, and to whole pages."""
    step = max(mmap.PAGESIZE, 1 << max(0, size.bit_length() - 1 - _STEP_BITS))
    return max(step, -(-size // step) * step)
