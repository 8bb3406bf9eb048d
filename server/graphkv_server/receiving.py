"""The messages of one call as they come, and how long each is waited for.

A caller who sends nothing is ended after the stall timeout; sooner where it holds room that others wait for, and at once
where it has not even begun and the replica drains. Knows no gRPC and no message's content.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from graphkv.terms.errors import DeadlineError, Reason, UnavailableError
from graphkv_server.admission import Reservation

__all__ = ["Receiver"]

_LAST_BREATH = 1.0
"""Seconds to wait, where a stream ended too early, for the cancellation that follows when its caller has died."""
_HALF_CLOSE = 1.0
"""Seconds to wait, after `end`, for the stream to be closed by its caller: what comes instead is a violation."""


class Receiver:
    """Reads `requests` for the call of `reservation`. draining: set once the replica takes no new calls."""

    def __init__(
        self, requests: AsyncIterator[Any], reservation: Reservation, *, stall_timeout: float, draining: asyncio.Event
    ) -> None:
        self._requests = requests
        self._reservation = reservation
        self._stall_timeout = stall_timeout
        self._draining = draining

    async def first(self) -> Any | None:
        """The first message, or None. Raises UnavailableError where the replica drains before it came; else as `next`."""
        try:
            return await self._read(self._stall_timeout, hurry=self._draining)
        except TimeoutError:
            if self._draining.is_set():
                raise UnavailableError("the replica is draining", reason=Reason.DRAINING) from None
            raise _slow(self._stall_timeout) from None
        except StopAsyncIteration:
            await asyncio.sleep(_LAST_BREATH)
            return None

    async def next(self, *, ended: bool = False) -> Any | None:
        """The next message, or None at the stream's end. Raises DeadlineError (SLOW_CLIENT) where none comes in time."""
        if ended:
            with contextlib.suppress(TimeoutError, StopAsyncIteration):
                return await self._read(_HALF_CLOSE)
            return None
        patience = min(self._reservation.patience, self._stall_timeout)
        try:
            return await self._read(self._stall_timeout, hurry=self._reservation.contended, after=patience)
        except TimeoutError:
            raise _slow(patience) from None
        except StopAsyncIteration:
            await asyncio.sleep(_LAST_BREATH)
            return None

    async def _read(self, seconds: float, *, hurry: asyncio.Event | None = None, after: float = 0.0) -> Any:
        """Raises TimeoutError after `seconds`, or sooner, but not before `after` seconds, where `hurry` is set."""
        reading = asyncio.ensure_future(anext(self._requests))  # a task: a read that is cancelled loses its message
        reading.add_done_callback(_looked_at)
        hurried: asyncio.Future[Any] | None = None
        try:
            if hurry is None or after >= seconds:
                await asyncio.wait((reading,), timeout=seconds)
            elif not after or reading not in (await asyncio.wait((reading,), timeout=after))[0]:
                hurried = asyncio.ensure_future(hurry.wait())
                await asyncio.wait((reading, hurried), timeout=seconds - after, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise TimeoutError
            return reading.result()
        finally:
            reading.cancel()
            if hurried is not None:
                hurried.cancel()


def _looked_at(reading: "asyncio.Future[Any]") -> None:
    """asyncio complains about an error that nobody took, also where the call had ended meanwhile."""
    if not reading.cancelled():
        reading.exception()


def _slow(seconds: float) -> DeadlineError:
    return DeadlineError(f"nothing was sent for {seconds:g} seconds", reason=Reason.SLOW_CLIENT)
