"""LayerStream: layers go in while a prefill makes them, selections come out. The threads and the waiting of the client.

gRPC takes the messages on a thread of its own (torch tensors are scored there), and one thread folds the answers. What is
sent, what may wait and what an answer means is in `_feed` and `_call`, which the asyncio twin shares.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from graphkv.terms.errors import DeadlineError, GraphKVError, InvalidInputError, Reason, invalid
from graphkv.terms.selection import LayerSelection, Summary
from graphkv_client._arrays import Array
from graphkv_client._attempts import Attempt
from graphkv_client._call import Call, fallen_back, streaming
from graphkv_client._channel import closed_error
from graphkv_client._exchange import Exchange
from graphkv_client._fallback import covers, instead
from graphkv_client._feed import Feed
from graphkv_client._fleet import Fleet
from graphkv_client._pieces import Work
from graphkv_client._puts import Put
from graphkv_client._retry import Tries
from graphkv_client.options import ClientOptions

__all__ = ["FALLING_BACK", "LayerStream"]

FALLING_BACK = 1.0
"""Seconds between two looks at whether the answer is there that is made in the service's stead."""


class LayerStream:
    """Layers of one call as a prefill makes them: `put` each, then iterate over the selections, inside a `with` block.

    ```python
    with client.stream(num_layers=32, policy=policy) as stream:
        for layer in range(32):
            stream.put(layer, keys=k, queries=q)      # returns at once
        for selection in stream:                      # as they come out, also while later layers go in
            selection.layer, selection.indices
    ```
    **Ownership.** An array given to `put` must stay unchanged until its layer's selection arrives, unless `copy=True`: where
    a replica is lost, what has no answer yet is sent again to another, and no layer is answered twice. Copies are kept for
    that as long as `max_buffered_bytes` has room; once they had to make room, a lost replica is the stream's failure.
    For CUDA tensors, work already queued on the current stream at `put` is waited for.
    **Policies that need all layers** (`policy.needs_all_layers`: granularity "model", budget_allocation "cake") answer
    nothing of a prompt before its last layer was put: iterating meanwhile waits, and arrays put without `copy=True` must
    stay unchanged until then. With "model" there is one selection a prompt, that of layer 0.
    **Leaving** the block ends the call: with answers still to come, it is cancelled. Iterating in the thread that puts,
    before every layer was put, raises InvalidInputError (INCOMPLETE); another thread may iterate meanwhile. A stream never
    answers in part: whatever goes wrong is raised instead of the next layer.
    """

    def __init__(
        self,
        fleet: Fleet,
        feed: Feed,
        encoding: str,
        timeout: float,
        options: ClientOptions,
    ) -> None:
        self._fleet = fleet
        self._options = options
        self._feed = feed
        self._encoding = encoding
        self._timeout = timeout
        self._changed = threading.Condition()  # guards all below, and the feed
        self._entered = 0.0
        self._open = False
        self._busy = False  # a work was taken and has not been sent
        self._putter = 0
        self._call: Call | None = None  # as it was sent last
        self._attempts = 0
        self._fell_back = False
        self._exchange: Exchange | None = None
        self._receiver: threading.Thread | None = None
        self._ready: deque[LayerSelection] = deque()
        self._answered = False
        self._failure: Exception | None = None
        self._seconds = 0.0

    def __enter__(self) -> Self:
        if self._entered:
            raise invalid("stream", "entered again", "used once", reason=Reason.BAD_LAYOUT)
        self._entered = time.monotonic()
        self._open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the call; cancels what still runs. A second time does nothing."""
        with self._changed:
            self._open = False
            exchange = self._exchange
            self._changed.notify_all()
        if exchange is not None:
            exchange.end()
        if self._receiver is not None:
            self._receiver.join()

    def put(
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
        """Hands over one layer, or a chunk of its tokens; returns at once.

        Args:
            layer: from 0; in any order.
            keys: [Hkv, n, d] (or as `layout` says); of a chunk [Hkv, count, d].
            queries: [Hq, w, d], with the chunk that completes the layer.
            attention: [Hq, w, n] likewise, or [Hq, w, count] with each chunk.
            scores: [Hkv, n] likewise, or [Hkv, count] with each chunk.
            values: [Hkv, count, any], of the tokens in `keys`; read before `put` returns.
            query_mean: [Hq, d], with the chunk that completes the layer.
            query_covariance: [Hq, d, d], likewise.
            similarity_keys: [Hkv, count, x], of the tokens in `keys`.
            positions: [count] or [Hkv, count], of the tokens in `keys`.
            start: the place of the chunk's first token. Left out: a whole layer. Chunks come in any split and order.
            prompt: which prompt of a batch.
            copy: keep copies, so that the arrays are free at once. They count in `max_buffered_bytes` until they are
                sent; at the bound `put` waits.

        Raises:
            InvalidInputError: it does not fit; nothing was taken.
            GraphKVError: the call has failed, or its time is over.
        """
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
        with self._changed:
            self._check_open()
            self._remaining()
            self._putter = threading.get_ident()
            if copy:
                put = self._copied(put)
            self._feed.add(put)
            if self._call is None and self._feed.preparation is not None:
                self._start()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[LayerSelection]:
        return self

    def __next__(self) -> LayerSelection:
        """The next layer's selection, waiting for it. Raises what the call failed with."""
        with self._changed:
            while True:
                self._check_open()
                if not self._feed.complete and self._putter == threading.get_ident():  # nobody else will put the rest
                    message = f"the stream is incomplete: {self._feed.missing()}"
                    raise InvalidInputError(message, argument="layer", reason=Reason.INCOMPLETE)
                if self._ready:
                    return self._ready.popleft()
                if self._answered:
                    raise StopIteration
                self._wait()

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
            self._changed.notify_all()
            raise
        self._receiver = threading.Thread(target=self._run, args=(remaining,), name="graphkv-answers", daemon=True)
        self._receiver.start()

    def _run(self, limit: float) -> None:
        """The call, on a thread of its own, so that `put` learns of a failure and answers wait for nobody."""
        failure: Exception | None = None
        try:
            tries = self._fleet.call(limit)
            while not self._sent(tries):
                pass
        except Exception as error:  # noqa: BLE001  # raised to whoever puts or iterates
            failure = error
        with self._changed:
            self._answered = failure is None
            if self._open:  # else it is the cancellation by `close`
                self._failure = failure
            self._seconds = time.monotonic() - self._entered
            self._changed.notify_all()

    def _sent(self, tries: Tries) -> bool:
        """Sends the call once; whether it was answered, by the service or in its stead. False: it is time to do it again."""
        attempt: Attempt | None = None
        try:
            with self._fleet.attempt(tries) as attempt:
                self._attempts = tries.attempts
                self._exchanged(attempt, tries)
        except GraphKVError as error:
            if not self._feed.whole or not self._fleet.again(tries, error, attempt, left=lambda: not self._open):
                self._instead(error, attempt)
                return True
            with self._changed:
                self._busy = False
                self._feed.rewind()
                request_id = self._call.request_id if self._call is not None else None
                self._call = streaming(self._feed, encoding=self._encoding, request_id=request_id)
            return False
        return True

    def _exchanged(self, attempt: Attempt, tries: Tries) -> None:
        """Messages to one replica and answers back. Raises why it failed."""
        with self._changed:
            if not self._open or self._call is None:
                attempt.own_fault = True
                raise closed_error("stream")
            call = self._call
            exchange = self._exchange = Exchange(call, attempt, lambda: self._fleet.closed)
        try:
            for response in exchange.start(attempt.line.select, self._requests(call, exchange), tries.remaining):
                layers = call.fold(response)
                with self._changed:
                    self._ready.extend(self._feed.answered(layers))
                    self._changed.notify_all()
            call.close()
        except (grpc.RpcError, GraphKVError) as error:
            failure = exchange.failed(error)
            if failure is error:
                raise
            raise failure from error
        finally:
            with self._changed:
                self._exchange = None
                self._changed.notify_all()  # the thread that makes messages may wait for the next put
            exchange.end()

    def _instead(self, error: GraphKVError, attempt: Attempt | None) -> None:
        """Answers what is left without the service, where that was asked for, once all was put; else raises the error."""
        choice = self._options.on_unavailable
        own_fault = attempt is not None and attempt.own_fault
        possible = choice == "keep_all" or (choice == "local" and self._feed.whole)
        if own_fault or not possible or not covers(error):
            raise error
        with self._changed:
            while self._open and not self._feed.complete:
                self._wait()
            if not self._open:
                raise error
            waiting = self._feed.waiting(arrays=choice == "local")
        layers = instead(choice, self._feed.terms, waiting)
        self._fleet.fell_back()
        with self._changed:
            self._fell_back = True
            self._ready.extend(self._feed.answered(layers))

    def _requests(self, call: Call, exchange: Exchange) -> Iterator[Any]:
        """The call's messages as layers come, on gRPC's thread."""
        while (work := self._next_work(exchange)) is not None:
            yield from call.messages(work)
            with self._changed:
                self._feed.sent(work)
                self._busy = False
                self._changed.notify_all()
        if self._exchange is exchange and self._open:
            yield call.end()

    def _next_work(self, exchange: Exchange) -> Work | None:
        """What to send next, waiting for it; None when all was sent, or the attempt or the stream has ended."""
        with self._changed:
            while self._open and self._failure is None and self._exchange is exchange:
                work = self._feed.take()
                if work is not None:
                    self._busy = True
                    return work
                if self._feed.complete:
                    return None
                self._changed.wait()
        return None

    def _copied(self, put: Put) -> Put:
        """The put with copies of its arrays, once there is room for them."""
        size, most, feed = put.nbytes, self._options.max_buffered_bytes, self._feed
        while feed.copied + feed.held > 0 and feed.copied + feed.held + size > most:
            if feed.let_go():
                continue
            if feed.idle and not self._busy:
                allowed = f"enough for the chunks that wait for the rest of their layer, {feed.copied + size} bytes now"
                raise invalid("max_buffered_bytes", most, allowed, reason=Reason.TOO_LARGE)
            self._wait()
            self._check_open()
        return put.copy()

    def _wait(self) -> None:
        """Until something changed; raises DeadlineError at the end of the stream's time."""
        self._changed.wait(self._remaining())

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
            raise invalid("stream", "used outside of its block", "entered: `with client.stream(...) as stream`")
        if not self._open:
            raise closed_error("stream")
        if self._fleet.closed and not self._answered:
            raise closed_error("client")
