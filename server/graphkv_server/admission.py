"""Admission: who may hold how much, and who waits. A call is a Reservation; what it holds for one layer is a Lease.

Two limits: calls open, and tensor bytes for which room is taken. A call whose largest layer can never fit is refused at
its header; a call that is larger as a whole flows through, layer after layer. Against deadlock a call never holds room
for an unfinished layer while it waits for more: then it gets it at once or is refused; one that needs all its layers
takes room for them together. A call without one waits its turn,
oldest first, no longer than its deadline and the queue timeout. Layers that wait for the engine or for their answer to be
sent do not count as unfinished: they end by themselves. Who is silent on an unfinished one makes way for those who wait
(see `Reservation.patience`).

Lives in one event loop; knows no gRPC and no tensor.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from graphkv.terms.errors import DeadlineError, OverloadedError, Reason, invalid
from graphkv_server.buffers import Buffer, BufferPool
from graphkv_server.metrics import Metrics

__all__ = ["Admission", "Lease", "Reservation"]

_RETRY_AFTER = 0.5
"""Seconds a refused caller is told to wait where nothing better is known."""

_LEAST_PATIENCE = 1.0
"""Seconds a caller may always be silent, however short the queue timeout is."""

Clock = Callable[[], float]


class Lease:
    """Room for one layer: `size` bytes counted as in flight, and a buffer of at least that size, if any is asked for."""

    __slots__ = ("_admission", "_buffer", "_reservation", "size")

    def __init__(self, admission: "Admission", reservation: "Reservation", size: int) -> None:
        self._admission = admission
        self._reservation = reservation
        self._buffer: Buffer | None = None
        self.size = size

    def buffer(self, size: int) -> Buffer:
        """The memory of this lease, taken from the pool at the first call; at least `size` bytes."""
        if self._buffer is None:
            self._buffer = self._admission.pool.take(size)
        return self._buffer

    def finished(self) -> None:
        """The layer has all its bytes: its call may wait for another lease from now on."""
        self._reservation.unfinished.discard(self)

    def shrink(self, size: int) -> None:
        """The layer is computed: its buffer goes back, and only its answer's `size` bytes stay counted until it is sent."""
        self._return_buffer()
        if size < self.size:
            self._admission.freed(self.size - size)
            self.size = size

    def give_back(self) -> None:
        """Ends the lease; a second time does nothing."""
        self.shrink(0)
        self._reservation.unfinished.discard(self)

    def _return_buffer(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._admission.pool.give_back(buffer)


class Reservation:
    """One call's place. Leaving the block gives back the place and the room of layers that never became whole.

    The engine gives back the leases of the layers it was handed, also of a call that has ended.
    """

    def __init__(self, admission: "Admission", deadline: float | None) -> None:
        self._admission = admission
        self._deadline = deadline
        self.unfinished: set[Lease] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for lease in list(self.unfinished):
            lease.give_back()
        self._admission.left()

    @property
    def patience(self) -> float:
        """Seconds of silence after which this call is in the way of others; infinite where it holds no unfinished layer.

        Half the queue timeout, so that those who wait then still get their turn.
        """
        return self._admission.patience if self.unfinished else math.inf

    @property
    def contended(self) -> asyncio.Event:
        """Set as long as others wait for room."""
        return self._admission.contended

    def check_fits(self, argument: str, size: int, what: str = "") -> None:
        """Raises InvalidInputError (TOO_LARGE) where `size` bytes of one layer, or `what` says of what, can never be held."""
        self._admission.check_fits(argument, size, what)

    def scarce(self, size: int) -> bool:
        """Whether room for `size` bytes would have to be waited for."""
        return self._admission.scarce(size)

    async def lease(self, *sizes: int) -> list[Lease]:
        """Room for layers of these sizes, all of it or none.

        Raises InvalidInputError (TOO_LARGE) where they can never fit together, OverloadedError where the call already
        holds an unfinished layer and there is no room now, or none came within the queue timeout, and DeadlineError.
        """
        total = sum(sizes)
        self._admission.check_fits("layers together in one message" if len(sizes) > 1 else "largest_layer_bytes", total)
        if self.unfinished:
            self._admission.take_now(total)
        else:
            await self._admission.wait_for(total, self._deadline)
        leases = [Lease(self._admission, self, size) for size in sizes]
        self.unfinished.update(leases)
        return leases


class Admission:
    """The limits of one replica and what is taken of them. Times in seconds, sizes in bytes."""

    def __init__(
        self,
        pool: BufferPool,
        metrics: Metrics,
        *,
        max_bytes: int,
        max_requests: int,
        queue_timeout: float,
        clock: Clock = time.monotonic,
    ) -> None:
        self.pool = pool
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._max_requests = max_requests
        self._queue_timeout = queue_timeout
        self._clock = clock
        self._bytes = 0
        self._requests = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.contended = asyncio.Event()  # set as long as somebody waits
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def bytes_in_flight(self) -> int:
        """Bytes for which room is taken."""
        return self._bytes

    @property
    def patience(self) -> float:
        """Seconds of silence after which a call that holds room is in the way of those who wait for it."""
        return max(_LEAST_PATIENCE, self._queue_timeout / 2)

    @property
    def requests_in_flight(self) -> int:
        """Calls open."""
        return self._requests

    def admit(self, deadline: float | None = None) -> Reservation:
        """A place for one call, until its Reservation's block ends; `deadline` by the clock, None = none.

        Raises OverloadedError where all places are taken.
        """
        if self._requests >= self._max_requests:
            raise self._refused(f"{self._requests} calls are open, as many as this replica takes at once")
        self._requests += 1
        self._metrics.in_flight_requests.set(self._requests)
        self._idle.clear()
        return Reservation(self, deadline)

    def check_fits(self, argument: str, size: int, what: str = "") -> None:
        """Raises InvalidInputError (TOO_LARGE) where `size` bytes of one layer, or `what` says of what, can never be held."""
        if size > self._max_bytes:
            self._metrics.rejections_total.labels(reason=Reason.TOO_LARGE.value).inc()
            allowed = f"at most {self._max_bytes}, the tensor bytes this replica can hold"
            given = f"{size} {what}" if what else size
            raise invalid(argument, given, allowed, reason=Reason.TOO_LARGE)

    async def idle(self) -> None:
        """Returns when no call is open."""
        await self._idle.wait()

    def scarce(self, size: int) -> bool:
        """Whether others wait for room, or there is none for `size` bytes."""
        return bool(self._waiting) or self._bytes + size > self._max_bytes

    def take_now(self, size: int) -> None:
        """Takes room at once or raises OverloadedError."""
        if self._bytes + size > self._max_bytes:
            raise self._refused("no room for a second unfinished layer of this call; finish a layer before the next begins")
        self._set_bytes(self._bytes + size)

    async def wait_for(self, size: int, deadline: float | None) -> None:
        """Takes room, in turn. Raises OverloadedError after the queue timeout and DeadlineError after the deadline."""
        if not self.scarce(size):
            self._set_bytes(self._bytes + size)
            return
        started = self._clock()
        patience = self._queue_timeout if deadline is None else min(self._queue_timeout, deadline - started)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (size, turn)
        self._waiting.append(entry)
        self.contended.set()
        self._metrics.waiting_requests.set(len(self._waiting))
        try:
            done, _ = await asyncio.wait((turn,), timeout=max(0.0, patience))
        except asyncio.CancelledError:
            if turn.done():  # the room came in the same turn of the loop as the cancellation
                self.freed(size)
            raise
        finally:
            if not turn.done():
                self._waiting.remove(entry)
                self._next_turns()  # it may have stood before smaller ones
            self._metrics.waiting_requests.set(len(self._waiting))
            self._metrics.phase_duration_seconds.labels(phase="room").observe(self._clock() - started)
        if not done:
            if deadline is not None and self._clock() >= deadline:
                raise DeadlineError("the deadline passed while a layer waited for room", reason=Reason.EXPIRED)
            raise self._refused(f"no room for a layer of {size} bytes within {self._queue_timeout:g} seconds")

    def freed(self, size: int) -> None:
        """Room came back: whoever waits gets it, oldest first."""
        self._set_bytes(self._bytes - size)
        self._next_turns()

    def left(self) -> None:
        """A call's place came back."""
        self._requests -= 1
        self._metrics.in_flight_requests.set(self._requests)
        if self._requests == 0:
            self._idle.set()

    def _next_turns(self) -> None:
        while self._waiting and self._bytes + self._waiting[0][0] <= self._max_bytes:
            size, turn = self._waiting.popleft()
            self._set_bytes(self._bytes + size)
            turn.set_result(None)
        if not self._waiting:
            self.contended.clear()

    def _set_bytes(self, size: int) -> None:
        self._bytes = size
        self._metrics.in_flight_bytes.set(size)

    def _refused(self, message: str) -> OverloadedError:
        self._metrics.rejections_total.labels(reason=Reason.OVERLOADED.value).inc()
        return OverloadedError(message, reason=Reason.OVERLOADED, retry_after=_RETRY_AFTER)
