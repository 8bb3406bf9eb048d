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
from graphkv_client._attempts import Attempt
from graphkv_client._call import Call, fallen_back, streaming
from graphkv_client._channel import closed_error, error_from, error_of
from graphkv_client._fallback import covers, instead
from graphkv_client._feed import Feed
from graphkv_client._pieces import Work
from graphkv_client._puts import Put
from graphkv_client._retry import Tries
from graphkv_client.aio_fleet import AsyncFleet
from graphkv_client.options import ClientOptions
from graphkv_client.stream import FALLING_BACK

__all__ = ["AsyncLayerStream", "Exchange", "is_task_cancelled", "off_loop"]


async def off_loop(made: Iterator[Any]) -> AsyncIterator[Any]:
    """The iterator's values, each made on a thread: making one may score a layer or copy it from a device."""
    while (value := await asyncio.to_thread(next, made, None)) is not None:
        yield value


class Exchange:
    """One Select call on the wire. An error while its messages are made must end it, and is what the caller gets.

    `attempt`: whom it tells of what moves.
    """

    def __init__(self, call: Call, attempt: Attempt) -> None:
        self._call = call
        self._attempt = attempt
        self._rpc: Any = None
        self._refused: GraphKVError | None = None
        self.failure: Exception | None = None

    async def answers(self, requests: AsyncIterator[Any], timeout: float) -> AsyncIterator[Any]:  # noqa: ASYNC109  # gRPC's
        """Sends; the answers as they come. Raises InvalidInputError where the client was closed."""
        try:
            self._rpc = self._attempt.line.select(self._guarded(requests), timeout=timeout)
        except grpc.aio.UsageError as error:  # gRPC's word for a closed channel
            raise closed_error("client") from error
        self._rpc.add_done_callback(self._note_status)
        self._attempt.cancel = self._rpc.cancel
        async for response in self._rpc:
            self._attempt.progress.sign()
            yield response

    def cancel(self) -> None:
        """Ends the call, if it has not ended: an abandoned one is never collected (grpc#43462)."""
        if self._rpc is not None:
            self._rpc.cancel()

    def failed(self, error: BaseException) -> BaseException:
        """Why the call failed, as the caller shall see it: what went wrong here comes before its effect on the wire."""
        found: BaseException = error
        if is_task_cancelled():
            return error
        if self.failure is not None:
            found, self._attempt.own_fault = self.failure, True
        elif self._attempt.loss is not None:
            found = self._attempt.loss
        elif isinstance(error, grpc.RpcError):
            found = self._refused or error_of(error, self._call.request_id)
        elif isinstance(error, asyncio.CancelledError):
            found, self._attempt.own_fault = closed_error("client"), True  # which ended the call under our hands
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
        progress = self._attempt.progress
        try:
            while True:
                progress.ours()
                message = await anext(requests, None)
                progress.moved()
                if message is None:
                    return
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


def is_task_cancelled() -> bool:
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

    def __init__(self, fleet: AsyncFleet, feed: Feed, encoding: str, timeout: float, options: ClientOptions) -> None:
        self._fleet = fleet
        self._options = options
        self._feed = feed
        self._encoding = encoding
        self._timeout = timeout
        self._changed = asyncio.Event()
        self._entered = 0.0
        self._open = False
        self._busy = False  # a work was taken and has not been sent
        self._putter: asyncio.Task[Any] | None = None
        self._call: Call | None = None  # as it was sent last
        self._attempts = 0
        self._fell_back = False
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
        summary = self._call.summary(seconds={"total": self._seconds}, attempts=self._attempts)
        return fallen_back(summary, self._options.on_unavailable) if self._fell_back else summary

    def _start(self) -> None:
        """Opens the call: its sizes are known now. What prevents it is the stream's failure, since a put was taken."""
        try:
            self._call = streaming(self._feed, encoding=self._encoding)
            remaining = self._remaining()
        except GraphKVError as error:
            self._failure = error
            self._changed.set()
            raise
        self._receiver = asyncio.create_task(self._run(remaining), name="graphkv-answers")

    async def _run(self, limit: float) -> None:
        """The call, in a task of its own, so that `put` learns of a failure and answers wait for nobody."""
        try:
            tries = await self._fleet.call(limit)
            while not await self._sent(tries):
                pass
            self._answered = True
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # raised to whoever puts or iterates
            if self._open:  # else it is the cancellation by `close`
                self._failure = error
        self._seconds = time.monotonic() - self._entered
        self._changed.set()

    async def _sent(self, tries: Tries) -> bool:
        """Sends the call once; whether it was answered, by the service or in its stead. False: it is time to do it again."""
        attempt: Attempt | None = None
        try:
            with self._fleet.attempt(tries) as attempt:
                self._attempts = tries.attempts
                await self._exchanged(attempt, tries)
        except GraphKVError as error:
            if not self._feed.whole or not await self._fleet.again(tries, error, attempt, left=lambda: not self._open):
                await self._instead(error, attempt)
                return True
            self._busy = False
            self._feed.rewind()
            request_id = self._call.request_id if self._call is not None else None
            self._call = streaming(self._feed, encoding=self._encoding, request_id=request_id)
            return False
        return True

    async def _exchanged(self, attempt: Attempt, tries: Tries) -> None:
        """Messages to one replica and answers back. Raises why it failed."""
        if not self._open or self._call is None:
            attempt.own_fault = True
            raise closed_error("stream")
        call = self._call
        exchange = self._exchange = Exchange(call, attempt)
        try:
            async for response in exchange.answers(self._requests(call, exchange), tries.remaining):
                self._ready.extend(self._feed.answered(call.fold(response)))
                self._changed.set()
            call.close()
        except (grpc.RpcError, GraphKVError, asyncio.CancelledError) as error:
            failure = exchange.failed(error)
            if failure is error:
                raise
            raise failure from error
        finally:
            self._exchange = None
            self._changed.set()  # what makes messages may wait for the next put
            exchange.cancel()

    async def _instead(self, error: GraphKVError, attempt: Attempt | None) -> None:
        """Answers what is left without the service, where that was asked for, once all was put; else raises the error."""
        choice = self._options.on_unavailable
        own_fault = attempt is not None and attempt.own_fault
        possible = choice == "keep_all" or (choice == "local" and self._feed.whole)
        if own_fault or not possible or not covers(error):
            raise error
        while self._open and not self._feed.complete:
            await self._wait()
        if not self._open:
            raise error
        layers = await asyncio.to_thread(self._chosen_here, choice)
        self._fleet.fell_back()
        self._fell_back = True
        self._ready.extend(self._feed.answered(layers))

    def _chosen_here(self, choice: str) -> list[LayerSelection]:
        return instead(choice, self._feed.terms, self._feed.waiting(arrays=choice == "local"))

    async def _requests(self, call: Call, exchange: Exchange) -> AsyncIterator[Any]:
        """The call's messages as layers come, in gRPC's task."""
        while (work := await self._next_work(exchange)) is not None:
            async for message in off_loop(call.messages(work)):
                yield message
            if self._exchange is not exchange:
                return
            self._feed.sent(work)
            self._busy = False
            self._changed.set()
        if self._exchange is exchange and self._open:
            yield call.end()

    async def _next_work(self, exchange: Exchange) -> Work | None:
        """What to send next, waiting for it; None when all was sent, or the attempt or the stream has ended."""
        while self._open and self._failure is None and self._exchange is exchange:
            work = self._feed.take()
            if work is not None:
                self._busy = True
                return work
            if self._feed.complete:
                return None
            self._changed.clear()
            await self._changed.wait()
        return None

    async def _copied(self, put: Put) -> Put:
        """The put with copies of its arrays, once there is room for them."""
        size, most, feed = put.nbytes, self._options.max_buffered_bytes, self._feed
        while feed.copied + feed.held > 0 and feed.copied + feed.held + size > most:
            if feed.let_go():
                continue
            if feed.idle and not self._busy:
                allowed = f"enough for the chunks that wait for the rest of their layer, {feed.copied + size} bytes now"
                raise invalid("max_buffered_bytes", most, allowed, reason=Reason.TOO_LARGE)
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
        if remaining <= 0 and self._options.falls_back and self._feed.complete:
            return FALLING_BACK  # the answer is made here now
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
        if self._fleet.closed and not self._answered:
            raise closed_error("client")
