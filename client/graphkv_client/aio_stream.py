"""AsyncLayerStream: the twin of `stream.LayerStream` for asyncio. Two tasks, no lock: everything is in one event loop.

What is sent, what may wait and what an answer means is in `_feed` and `_call`.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from graphkv.terms.errors import DeadlineError, GraphKVError, InvalidInputError, Reason, invalid
from graphkv.terms.selection import LayerSelection, Summary
from graphkv_client._arrays import Array
from graphkv_client._call import Call, streaming
from graphkv_client._channel import closed_error, error_from, error_of
from graphkv_client._feed import Feed, Put
from graphkv_client._pieces import Work

__all__ = ["AsyncLayerStream", "Exchange", "off_loop"]


async def off_loop(made: Iterator[Any]) -> AsyncIterator[Any]:
    """The iterator's values, each made on a thread: making one may score a layer or copy it from a device."""
    while (value := await asyncio.to_thread(next, made, None)) is not None:
        yield value


class Exchange:
    """One Select call on the wire. An error while its messages are made must end it, and is what the caller gets."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._rpc: Any = None
        self._refused: GraphKVError | None = None
        self.failure: Exception | None = None

    def start(self, method: Any, requests: AsyncIterator[Any], timeout: float) -> AsyncIterator[Any]:
        """Sends; the answers as they come. Raises InvalidInputError where the client was closed."""
        try:
            self._rpc = method(self._guarded(requests), timeout=timeout)
        except grpc.aio.UsageError as error:  # gRPC's word for a closed channel
            raise closed_error("client") from error
        self._rpc.add_done_callback(self._note_status)
        answers: AsyncIterator[Any] = self._rpc
        return answers

    def cancel(self) -> None:
        """Ends the call, if it has not ended: an abandoned one is never collected (grpc#43462)."""
        if self._rpc is not None:
            self._rpc.cancel()

    def failed(self, error: BaseException) -> BaseException:
        """Why the call failed, as the caller shall see it: what went wrong here comes before its effect on the wire."""
        found: BaseException = error
        if self.failure is not None and not _task_cancelled():
            found = self.failure
        elif isinstance(error, grpc.RpcError):
            found = self._refused or error_of(error, self._call.request_id)
        elif isinstance(error, asyncio.CancelledError) and not _task_cancelled():
            found = closed_error("client")  # which ended the call under our hands
        if isinstance(found, GraphKVError) and found.request_id is None:
            found.request_id = self._call.request_id
        return found

    def _note_status(self, rpc: Any) -> None:
        """Keeps the service's own status: a write that fails just after it would put INTERNAL in its place (grpc#36066)."""
        code = _at_once(rpc.code())
        if self._refused is None and code is not grpc.StatusCode.OK:
            details, trailing = _at_once(rpc.details()), _at_once(rpc.trailing_metadata())
            self._refused = error_from(code, details, trailing, self._call.request_id)

    async def _guarded(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        try:
            async for message in requests:
                yield message
        except Exception as error:  # noqa: BLE001  # raised to the caller by `failed`; gRPC would only log it
            self.failure = error
            self.cancel()


def _at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The value of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    finally:
        coroutine.close()
    raise RuntimeError("the status of a call that is done was not there")


def _task_cancelled() -> bool:
    """Whether somebody cancelled this task; gRPC also raises CancelledError where only the call was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncLayerStream:
    """Layers of one call as a prefill makes them: `await put` each, then `async for` over the selections.

    ```python
    async with client.stream(num_layers=32, policy=policy) as stream:
        for layer in range(32):
            await stream.put(layer, keys=k, queries=q)
        async for selection in stream:
            selection.layer, selection.indices
    ```
    Ownership, policies that need all layers, leaving and failing: as `LayerStream` says, with tasks in the place of threads.
    """

    def __init__(self, method: Any, feed: Feed, encoding: str, timeout: float, max_buffered_bytes: int) -> None:
        self._method = method
        self._feed = feed
        self._encoding = encoding
        self._timeout = timeout
        self._max_buffered_bytes = max_buffered_bytes
        self._changed = asyncio.Event()
        self._entered = 0.0
        self._open = False
        self._busy = False  # a work was taken and has not been sent
        self._putter: asyncio.Task[Any] | None = None
        self._call: Call | None = None
        self._exchange: Exchange | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._ready: deque[LayerSelection] = deque()
        self._answered = False
        self._failure: BaseException | None = None
        self._seconds = 0.0

    async def __aenter__(self) -> Self:
        if self._entered:
            raise invalid("stream", "entered again", "used once", reason=Reason.BAD_LAYOUT)
        self._entered = time.monotonic()
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the call; cancels what still runs. A second time does nothing."""
        self._open = False
        self._changed.set()
        if self._exchange is not None:
            self._exchange.cancel()
        if self._receiver is not None:
            await asyncio.wait((self._receiver,))

    async def put(
        self,
        layer: int,
        *,
        keys: Array,
        queries: Array | None = None,
        attention: Array | None = None,
        scores: Array | None = None,
        values: Array | None = None,
        query_mean: Array | None = None,
        query_covariance: Array | None = None,
        similarity_keys: Array | None = None,
        positions: Array | None = None,
        start: int | None = None,
        prompt: int = 0,
        copy: bool = False,
    ) -> None:
        """Hands over one layer, or a chunk of its tokens; waits only at the bound of copies. As `LayerStream.put`."""
        given = {
            "keys": keys,
            "queries": queries,
            "attention": attention,
            "scores": scores,
            "values": values,
            "query_mean": query_mean,
            "query_covariance": query_covariance,
            "similarity_keys": similarity_keys,
            "positions": positions,
        }
        put = self._feed.read(layer, given, prompt=prompt, start=start)
        self._check_open()
        self._remaining()
        self._putter = asyncio.current_task()
        if copy:
            put = await self._copied(put)
        self._feed.add(put)
        if self._call is None and self._feed.preparation is not None:
            self._start()
        self._changed.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LayerSelection:
        """The next layer's selection, waiting for it. Raises what the call failed with."""
        while True:
            self._check_open()
            if not self._feed.complete and self._putter is asyncio.current_task():  # nobody else will put the rest
                message = f"the stream is incomplete: {self._feed.missing()}"
                raise InvalidInputError(message, argument="layer", reason=Reason.INCOMPLETE)
            if self._ready:
                return self._ready.popleft()
            if self._answered:
                raise StopAsyncIteration
            await self._wait()

    @property
    def summary(self) -> Summary:
        """What the call took; raises InvalidInputError before the last selection has come."""
        if self._call is None or not self._answered:
            raise invalid("summary", "asked for", "asked for after the last selection", reason=Reason.INCOMPLETE)
        return self._call.summary(seconds={"total": self._seconds})

    def _start(self) -> None:
        """Opens the call: its sizes are known now. What prevents it is the stream's failure, since a put was taken."""
        try:
            self._call = streaming(self._feed, encoding=self._encoding)
            self._exchange = Exchange(self._call)
            answers = self._exchange.start(self._method, self._requests(self._call), self._remaining())
        except GraphKVError as error:
            self._failure = error
            self._changed.set()
            raise
        self._receiver = asyncio.create_task(self._receive(self._call, self._exchange, answers), name="graphkv-answers")

    async def _requests(self, call: Call) -> AsyncIterator[Any]:
        """The call's messages as layers come, in gRPC's task."""
        while (work := await self._next_work()) is not None:
            async for message in off_loop(call.messages(work)):
                yield message
            self._feed.sent(work)
            self._busy = False
            self._changed.set()
        if self._open:
            yield call.end()

    async def _next_work(self) -> Work | None:
        """What to send next, waiting for it; None when all was sent or the stream has ended."""
        while self._open and self._failure is None:
            work = self._feed.take()
            if work is not None:
                self._busy = True
                return work
            if self._feed.complete:
                return None
            self._changed.clear()
            await self._changed.wait()
        return None

    async def _receive(self, call: Call, exchange: Exchange, answers: AsyncIterator[Any]) -> None:
        """Folds answers, in a task of its own, so that `put` learns of a failure and answers wait for nobody."""
        try:
            async for response in answers:
                self._ready.extend(call.fold(response))
                self._changed.set()
            call.close()
            self._answered = True
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # raised to whoever puts or iterates
            failure = exchange.failed(error)
            if failure is not error:
                failure.__cause__ = error
            if self._open:  # else it is the cancellation by `close`
                self._failure = failure
            exchange.cancel()
        self._seconds = time.monotonic() - self._entered
        self._changed.set()

    async def _copied(self, put: Put) -> Put:
        """The put with copies of its arrays, once there is room for them."""
        size = put.nbytes
        while self._feed.copied and self._feed.copied + size > self._max_buffered_bytes:
            if self._feed.idle and not self._busy:
                allowed = f"enough for the chunks that wait for the rest of their layer, {self._feed.copied + size} bytes now"
                raise invalid("max_buffered_bytes", self._max_buffered_bytes, allowed, reason=Reason.TOO_LARGE)
            await self._wait()
            self._check_open()
        return put.copy()

    async def _wait(self) -> None:
        """Until something changed; raises DeadlineError at the end of the stream's time."""
        remaining = self._remaining()
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(remaining):
                await self._changed.wait()
                return
        self._remaining()

    def _remaining(self) -> float:
        """Seconds that are left of the stream's time; raises DeadlineError where none are."""
        remaining = self._entered + self._timeout - time.monotonic()
        if remaining <= 0:
            incomplete = "" if self._feed.complete else f"; {self._feed.missing()}"
            request_id = self._call.request_id if self._call is not None else None
            raise DeadlineError(f"the stream took longer than {self._timeout:g} seconds{incomplete}", request_id=request_id)
        return remaining

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if not self._entered:
            raise invalid("stream", "used outside of its block", "entered: `async with client.stream(...) as stream`")
        if not self._open:
            raise closed_error("stream")
