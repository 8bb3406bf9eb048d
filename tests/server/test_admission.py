"""Admission: bounds are kept, nobody holds and waits, turns are in order, and everything comes back."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from graphkv_server.admission import Admission, Reservation
from graphkv_server.buffers import BufferPool
from graphkv_server.metrics import Metrics

from graphkv.terms.errors import DeadlineError, InvalidInputError, OverloadedError


def admission(max_bytes: int = 100, max_requests: int = 10, queue_timeout: float = 30.0) -> Admission:
    return Admission(
        BufferPool(max_bytes), Metrics(), max_bytes=max_bytes, max_requests=max_requests, queue_timeout=queue_timeout
    )


def run(body: Callable[[], Awaitable[Any]]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_layer_that_never_fits_is_refused_for_good() -> None:
    limits = admission()
    limits.check_fits("largest_layer_bytes", 100)
    with pytest.raises(InvalidInputError) as caught:
        limits.check_fits("largest_layer_bytes", 2**62)
    assert (caught.value.reason, caught.value.argument) == ("TOO_LARGE", "largest_layer_bytes")


def test_places_are_limited_and_come_back() -> None:
    limits = admission(max_requests=2)
    with limits.admit(), limits.admit():
        with pytest.raises(OverloadedError) as caught:
            limits.admit()
        assert caught.value.retry_after is not None
        assert caught.value.retryable
    with limits.admit():
        assert limits.requests_in_flight == 1


def test_what_never_became_whole_comes_back_with_the_block_and_the_rest_by_itself() -> None:
    async def body() -> None:
        limits = admission()
        with limits.admit() as call:
            (whole,) = await call.lease(30)
            whole.buffer(30)
            whole.finished()
            (unfinished,) = await call.lease(40)
            unfinished.buffer(40)
            assert limits.bytes_in_flight == 70
        assert limits.bytes_in_flight == 30
        whole.shrink(8)
        assert limits.bytes_in_flight == 8
        whole.give_back()
        whole.give_back()
        assert limits.bytes_in_flight == 0
        assert limits.pool.lent_bytes == 0

    run(body)


def test_who_holds_an_unfinished_layer_never_waits() -> None:
    async def body() -> None:
        limits = admission()
        with limits.admit() as call:
            await call.lease(60)
            await call.lease(40)
            with pytest.raises(OverloadedError):
                await call.lease(1)

    run(body)


def test_turns_are_in_order_even_for_small_ones() -> None:
    async def body() -> None:
        limits = admission()
        order: list[str] = []

        async def caller(name: str, size: int) -> None:
            with limits.admit() as call:
                await call.lease(size)
                order.append(name)
                await settle()

        with limits.admit() as first:
            (lease,) = await first.lease(90)
            waiting = [asyncio.create_task(caller("large", 80))]
            await settle()
            waiting.append(asyncio.create_task(caller("small", 10)))
            await settle()
            assert order == []
            lease.give_back()
            await asyncio.gather(*waiting)
        assert order == ["large", "small"]
        assert limits.bytes_in_flight == 0

    run(body)


def test_half_full_calls_cannot_block_each_other() -> None:
    """A pool of two layers and four interleaved uploads of three layers each: all finish."""

    async def body() -> None:
        limits = admission(max_bytes=20)
        done: list[int] = []

        async def upload(number: int) -> None:
            with limits.admit() as call:
                for _ in range(3):
                    (lease,) = await call.lease(10)
                    await settle()
                    lease.finished()
                    asyncio.get_running_loop().call_soon(lease.give_back)  # the engine
                done.append(number)

        await asyncio.wait_for(asyncio.gather(*map(upload, range(4))), 10)
        await settle()
        assert sorted(done) == [0, 1, 2, 3]
        assert limits.bytes_in_flight == 0

    run(body)


@pytest.mark.parametrize("limit", ["queue timeout", "deadline"])
def test_waiting_ends(limit: str) -> None:
    async def body() -> None:
        limits = admission(queue_timeout=0.01 if limit == "queue timeout" else 30.0)
        now = asyncio.get_running_loop().time()
        with limits.admit() as first, limits.admit(now + 0.01 if limit == "deadline" else None) as second:
            (lease,) = await first.lease(100)
            with pytest.raises(DeadlineError if limit == "deadline" else OverloadedError):
                await second.lease(1)
            lease.give_back()
            assert limits.bytes_in_flight == 0
            await second.lease(1)

    run(body)


@pytest.mark.parametrize("moment", ["waiting", "granted in the same turn"])
def test_a_caller_who_leaves_the_queue_takes_nothing(moment: str) -> None:
    async def body() -> None:
        limits = admission()

        async def caller(call: Reservation) -> None:
            await call.lease(50)

        with limits.admit() as first, limits.admit() as second, limits.admit() as third:
            (lease,) = await first.lease(100)
            leaver = asyncio.create_task(caller(second))
            await settle()
            stayer = asyncio.create_task(caller(third))
            await settle()
            if moment == "waiting":
                leaver.cancel()
                await settle()
                lease.give_back()
            else:
                lease.give_back()
                leaver.cancel()
            await settle()
            assert leaver.cancelled()
            assert stayer.done()
            assert limits.bytes_in_flight == 50
        assert limits.bytes_in_flight == 0

    run(body)


def test_idle_means_no_call_is_open() -> None:
    async def body() -> None:
        limits = admission()
        await limits.idle()
        with limits.admit():
            waiting = asyncio.create_task(limits.idle())
            await settle()
            assert not waiting.done()
        await asyncio.wait_for(waiting, 5)

    run(body)


def test_room_for_several_layers_is_taken_at_once_or_not_at_all() -> None:
    async def body() -> None:
        limits = admission()
        with limits.admit() as first, limits.admit() as second:
            (lease,) = await first.lease(50)
            waiting = asyncio.create_task(second.lease(30, 30))
            await settle()
            assert limits.bytes_in_flight == 50
            lease.give_back()
            await waiting
            assert limits.bytes_in_flight == 60
            with pytest.raises(InvalidInputError):
                await first.lease(60, 60)
        assert limits.bytes_in_flight == 0

    run(body)
