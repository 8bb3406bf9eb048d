"""How long a message is waited for: who is silent on room that others need makes way, and nobody else."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from graphkv_server import admission as admission_room
from graphkv_server import receiving
from graphkv_server.admission import Admission, Reservation
from graphkv_server.buffers import BufferPool
from graphkv_server.metrics import Metrics
from graphkv_server.receiving import Receiver

from graphkv.terms.errors import DeadlineError, UnavailableError


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_room, "_LEAST_PATIENCE", 0.0)
    monkeypatch.setattr(receiving, "_LAST_BREATH", 0.01)
    monkeypatch.setattr(receiving, "_HALF_CLOSE", 0.01)


class Caller:
    """A call's stream: what is put in comes out; None ends it."""

    def __init__(self, call: Reservation, *, stall_timeout: float = 30.0) -> None:
        self.sent: asyncio.Queue[str | None] = asyncio.Queue()
        self.draining = asyncio.Event()
        self.receiver = Receiver(self._messages(), call, stall_timeout=stall_timeout, draining=self.draining)

    async def _messages(self) -> AsyncIterator[str]:
        while (message := await self.sent.get()) is not None:
            yield message


def room(queue_timeout: float) -> Admission:
    return Admission(BufferPool(100), Metrics(), max_bytes=100, max_requests=9, queue_timeout=queue_timeout)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await body()
        await asyncio.sleep(0.01)  # what was cancelled ends
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(bounded())


@pytest.mark.parametrize("first", ["silent", "waiting"], ids=["silence begins first", "the wait begins first"])
def test_who_is_silent_on_room_that_others_wait_for_makes_way(first: str) -> None:
    async def hold(limits: Admission) -> str:
        with limits.admit() as call:
            await call.lease(60)
            with pytest.raises(DeadlineError) as caught:
                await Caller(call).receiver.next()
            return str(caught.value.reason)

    async def wait(limits: Admission) -> None:
        with limits.admit() as call:
            await call.lease(60)

    async def body() -> None:
        limits = room(queue_timeout=1.0)
        holding = asyncio.create_task(hold(limits))
        await asyncio.sleep(0.6 if first == "silent" else 0)
        await wait(limits)
        assert await holding == "SLOW_CLIENT"
        assert limits.bytes_in_flight == 0

    run(body)


@pytest.mark.parametrize("holds", ["nothing", "a whole layer", "an unfinished layer and nobody waits"])
def test_who_is_in_nobodys_way_may_be_silent(holds: str) -> None:
    async def body() -> None:
        limits = room(queue_timeout=0.1)
        with limits.admit() as call, limits.admit() as other:
            if holds != "nothing":
                (lease,) = await call.lease(60)
                if holds == "a whole layer":
                    lease.finished()
            caller = Caller(call)
            reading = asyncio.create_task(caller.receiver.next())
            if "nobody" not in holds:
                await other.lease(90 if holds == "nothing" else 40)
                waiting = asyncio.create_task(other.lease(90))
            await asyncio.sleep(0.2)
            await caller.sent.put("hello")
            assert await reading == "hello"
            if "nobody" not in holds:
                waiting.cancel()
                await asyncio.wait((waiting,))
                waiting.cancelled() or waiting.exception()
            if holds == "a whole layer":
                lease.give_back()

    run(body)


def test_silence_ends_at_the_stall_timeout() -> None:
    async def body() -> None:
        with room(queue_timeout=30.0).admit() as call:
            caller = Caller(call, stall_timeout=0.05)
            with pytest.raises(DeadlineError, match=r"nothing was sent for 0\.05 seconds"):
                await caller.receiver.first()
            with pytest.raises(DeadlineError, match=r"nothing was sent for 0\.05 seconds"):
                await Caller(call, stall_timeout=0.05).receiver.next()

    run(body)


def test_a_call_that_has_not_begun_ends_when_the_replica_drains_and_one_that_has_does_not() -> None:
    async def body() -> None:
        with room(queue_timeout=30.0).admit() as call:
            caller = Caller(call)
            first = asyncio.create_task(caller.receiver.first())
            await asyncio.sleep(0.01)
            caller.draining.set()
            with pytest.raises(UnavailableError) as caught:
                await first
            assert caught.value.reason == "DRAINING"
            begun = Caller(call)
            begun.sent.put_nowait("header")
            assert await begun.receiver.first() == "header"
            begun.draining.set()
            later = asyncio.create_task(begun.receiver.next())
            await asyncio.sleep(0.05)
            begun.sent.put_nowait("more")
            assert await later == "more"

    run(body)


def test_the_end_of_the_stream_is_none() -> None:
    async def body() -> None:
        with room(queue_timeout=30.0).admit() as call:
            caller = Caller(call)
            caller.sent.put_nowait(None)
            assert await caller.receiver.next() is None
            assert await Caller(call).receiver.next(ended=True) is None  # open after `end`: not for long
            other = Caller(call)
            other.sent.put_nowait(None)
            assert await other.receiver.first() is None

    run(body)
