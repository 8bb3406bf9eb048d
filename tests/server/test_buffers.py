"""The pool: buffers come back and are lent again, and lent and kept ones together stay within the bound."""

import numpy as np
import pytest
from graphkv_server.buffers import BufferPool, Bytes, Pinning
from hypothesis import given
from hypothesis import strategies as st


class CountedPinning(Pinning):
    def __init__(self) -> None:
        self.pinned = 0

    def pin(self, memory: Bytes) -> None:
        self.pinned += memory.nbytes

    def unpin(self, memory: Bytes) -> None:
        self.pinned -= memory.nbytes


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 1_000_003, 2**24, 2**24 + 1])
def test_a_buffer_has_the_size_asked_for_and_wastes_little(size: int) -> None:
    buffer = BufferPool(2**30).take(size)
    assert size <= buffer.memory.nbytes <= max(8192, size * 17 // 16 + 4096)
    assert buffer.memory.ctypes.data % 4096 == 0
    buffer.memory[:] = 255
    assert buffer.memory.dtype == np.uint8


def test_the_same_memory_is_lent_again() -> None:
    pool = BufferPool(2**20)
    first = pool.take(70_000)
    pool.give_back(first)
    assert pool.take(70_001) is first


def test_kept_buffers_make_room_for_lent_ones() -> None:
    pool = BufferPool(100_000)
    pool.give_back(pool.take(60_000))
    assert pool.kept_bytes >= 60_000
    pool.take(90_000)
    assert pool.kept_bytes == 0


@given(st.lists(st.one_of(st.integers(1, 60_000), st.none()), max_size=30))
def test_the_books_balance(steps: list[int | None]) -> None:
    pinning = CountedPinning()
    pool = BufferPool(200_000, pinning=pinning)
    lent = []
    for size in steps:
        if size is not None:
            lent.append(pool.take(size))
        elif lent:
            pool.give_back(lent.pop(0))
        assert pool.lent_bytes == sum(buffer.size_class for buffer in lent)
        assert pool.kept_bytes == 0 or pool.kept_bytes + pool.lent_bytes <= 200_000
        assert pinning.pinned == pool.lent_bytes + pool.kept_bytes
    for buffer in lent:
        pool.give_back(buffer)
    pool.close()
    assert (pool.lent_bytes, pool.kept_bytes, pinning.pinned) == (0, 0, 0)
