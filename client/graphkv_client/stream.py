"""LayerStream: layers go in while a prefill makes them, selections come out. The threads and the waiting of the client.

gRPC takes the messages on a thread of its own (torch tensors are scored there), and one thread folds the answers. What is
sent, what may wait and what an answer means is in `_feed` and `_call`, which the asyncio twin shares.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from graphkv.terms.errors import DeadlineError, GraphKVError, InvalidInputError, Reason, invalid
from graphkv.terms.selection import LayerSelection, Summary
from graphkv_client._arrays import Array
from graphkv_client._call import Call, streaming
from graphkv_client._channel import closed_error, error_of, is_cancellation
from graphkv_client._feed import Feed, Put
from graphkv_client._pieces import Work

__all__ = ["Exchange", "LayerStream"]


class Exchange:
    """One Select call on the wire. gRPC takes its messages on a thread of its own, and an error there must end the call."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._rpc: Any = None
        self._making = threading.Lock()  # held while a message is made
        self._ended = False
        self.failure: Exception | None = None

    def start(self, method: Any, requests: Iterator[Any], timeout: float) -> Iterator[Any]:
        """Sends; the answers as they come. Raises InvalidInputError where the client was closed."""
        try:
            self._rpc = method(self._guarded(requests), timeout=timeout)
        except ValueError as error:  # gRPC's word for a closed channel
            raise closed_error("client") from error
        if self.failure is not None:  # before there was a call to cancel
            self._rpc.cancel()
        answers: Iterator[Any] = self._rpc
        return answers

    def cancel(self) -> None:
        """Ends the call, if it has not ended: an abandoned one would be kept alive by gRPC."""
        if self._rpc is not None:
            self._rpc.cancel()

    def end(self) -> None:
        """Cancels, and waits until gRPC's thread has left our code: it may be scoring, and reads the caller's arrays.

        Without this an interpreter that ends meanwhile aborts, since it stops such threads in the middle of torch.
        """
        self._ended = True
        self.cancel()
        with self._making:
            pass

    def failed(self, error: Exception) -> Exception:
        """Why the call failed, as the caller shall see it: what went wrong here comes before its effect on the wire."""
        found = self.failure or (error_of(error, self._call.request_id) if isinstance(error, grpc.RpcError) else error)
        if isinstance(found, GraphKVError) and found.request_id is None:
            found.request_id = self._call.request_id
        return found

    def _guarded(self, requests: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self._making:
                if self._ended:
                    return
                try:
                    message = next(requests, None)
                except Exception as error:  # noqa: BLE001  # raised to the caller by `failed`; gRPC would only log it
                    self.failure = error
                    message = None
            if message is None:
                break
            yield message
        if self.failure is not None:
            self.cancel()


class LayerStream:
    """Layers of one call as a prefill makes them: `put` each, then iterate over the selections, inside a `with` block.

    ```python
    with client.stream(num_layers=32, policy=policy) as stream:
        for layer in range(32):
            stream.put(layer, keys=k, queries=q)      # returns at once
        for selection in stream:                      # as they come out, also while later layers go in
            selection.layer, selection.indices
    ```
    **Ownership.** An array given to `put` must stay unchanged until its layer's selection arrives, unless `copy=True`.
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
        method: Any,
        feed: Feed,
        encoding: str,
        timeout: float,
        max_buffered_bytes: int,
        client_closed: Callable[[], bool],
    ) -> None:
        self._method = method
        self._client_closed = client_closed
        self._feed = feed
        self._encoding = encoding
        self._timeout = timeout
        self._max_buffered_bytes = max_buffered_bytes
        self._changed = threading.Condition()  # guards all below, and the feed
        self._entered = 0.0
        self._open = False
        self._busy = False  # a work was taken and has not been sent
        self._putter = 0
        self._call: Call | None = None
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
            self._changed.notify_all()
        if self._exchange is not None:
            self._exchange.end()
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
        return self._call.summary(seconds={"total": self._seconds})

    def _start(self) -> None:
        """Opens the call: its sizes are known now. What prevents it is the stream's failure, since a put was taken."""
        try:
            self._call = streaming(self._feed, encoding=self._encoding)
            self._exchange = Exchange(self._call)
            answers = self._exchange.start(self._method, self._requests(self._call), self._remaining())
        except GraphKVError as error:
            self._failure = error
            self._changed.notify_all()
            raise
        self._receiver = threading.Thread(
            target=self._receive, args=(self._call, self._exchange, answers), name="graphkv-answers", daemon=True
        )
        self._receiver.start()

    def _requests(self, call: Call) -> Iterator[Any]:
        """The call's messages as layers come, on gRPC's thread."""
        while (work := self._next_work()) is not None:
            yield from call.messages(work)
            with self._changed:
                self._feed.sent(work)
                self._busy = False
                self._changed.notify_all()
        if self._open:
            yield call.end()

    def _next_work(self) -> Work | None:
        """What to send next, waiting for it; None when all was sent or the stream has ended."""
        with self._changed:
            while self._open and self._failure is None:
                work = self._feed.take()
                if work is not None:
                    self._busy = True
                    return work
                if self._feed.complete:
                    return None
                self._changed.wait()
        return None

    def _receive(self, call: Call, exchange: Exchange, answers: Iterator[Any]) -> None:
        """Folds answers, on a thread of its own, so that `put` learns of a failure and answers wait for nobody."""
        failure: Exception | None = None
        try:
            for response in answers:
                layers = call.fold(response)
                with self._changed:
                    self._ready.extend(layers)
                    self._changed.notify_all()
            call.close()
        except Exception as error:  # noqa: BLE001  # raised to whoever puts or iterates
            closed = self._client_closed() and exchange.failure is None and is_cancellation(error)
            failure = closed_error("client") if closed else exchange.failed(error)
            if failure is not error:
                failure.__cause__ = error
            exchange.cancel()
        with self._changed:
            self._answered = failure is None
            if self._open:  # else it is the cancellation by `close`
                self._failure = failure
            self._seconds = time.monotonic() - self._entered
            self._changed.notify_all()

    def _copied(self, put: Put) -> Put:
        """The put with copies of its arrays, once there is room for them."""
        size = put.nbytes
        while self._feed.copied and self._feed.copied + size > self._max_buffered_bytes:
            if self._feed.idle and not self._busy:
                allowed = f"enough for the chunks that wait for the rest of their layer, {self._feed.copied + size} bytes now"
                raise invalid("max_buffered_bytes", self._max_buffered_bytes, allowed, reason=Reason.TOO_LARGE)
            self._wait()
            self._check_open()
        return put.copy()

    def _wait(self) -> None:
        """Until something changed; raises DeadlineError at the end of the stream's time."""
        self._changed.wait(self._remaining())

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
            raise invalid("stream", "used outside of its block", "entered: `with client.stream(...) as stream`")
        if not self._open:
            raise closed_error("stream")
