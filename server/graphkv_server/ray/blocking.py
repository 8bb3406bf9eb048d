"""Calls that block, some for ever, from an event loop: each kind has one daemon thread, which nobody waits for at the end."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["BlockingCalls"]


class BlockingCalls:
    """Makes calls one after the other in a thread of its own, named `name`, that lives until `close`."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def call(self, call: Callable[[], Any]) -> Any:
        """What the call returns or raises; a caller that is cancelled leaves it running."""
        future = asyncio.get_running_loop().create_future()
        self._calls.put((call, future))
        return await future

    def close(self) -> None:
        """Ends the thread once its last call is over."""
        self._calls.put(None)

    def _work(self) -> None:
        while (entry := self._calls.get()) is not None:
            call, future = entry
            result, error = None, None
            try:
                result = call()
            except Exception as failure:  # noqa: BLE001  # whatever it is belongs to who asked
                error = failure
            loop = future.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, future, result, error)


def _settle(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():  # who asked has left
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
