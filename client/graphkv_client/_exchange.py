"""Exchange: one sending of a Select call on the wire, for the synchronous client. The twin for asyncio is in `aio_stream`."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from graphkv.terms.errors import GraphKVError
from graphkv_client._attempts import Attempt
from graphkv_client._call import Call
from graphkv_client._channel import closed_error, error_of, is_cancellation

__all__ = ["Exchange"]


class Exchange:
    """One Select call on the wire. gRPC takes its messages on a thread of its own, and an error there must end the call.

    attempt: whom it tells of what moves; closed: whether the client was.
    """

    def __init__(self, call: Call, attempt: Attempt | None = None, closed: Callable[[], bool] = lambda: False) -> None:
        self._call = call
        self._attempt = attempt
        self._closed = closed
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
        if self._attempt is not None:
            self._attempt.cancel = self._rpc.cancel
        if self._ended or self.failure is not None or self._lost:  # before there was a call to cancel
            self._rpc.cancel()
        return self._rpc if self._attempt is None else self._watched(self._attempt)

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
        closed = self._closed() and is_cancellation(error)
        found = self.failure or self._lost or (closed_error("client") if closed else error)
        if isinstance(found, grpc.RpcError):
            found = error_of(found, self._call.request_id)
        if self._attempt is not None:
            self._attempt.own_fault = self.failure is not None or closed
        if isinstance(found, GraphKVError) and found.request_id is None:
            found.request_id = self._call.request_id
        return found

    @property
    def _lost(self) -> GraphKVError | None:
        return self._attempt.loss if self._attempt is not None else None

    def _watched(self, attempt: Attempt) -> Iterator[Any]:
        for response in self._rpc:
            attempt.progress.sign()
            yield response

    def _guarded(self, requests: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self._making:
                if self._ended:
                    return
                if self._attempt is not None:
                    self._attempt.progress.ours()
                try:
                    message = next(requests, None)
                except Exception as error:  # noqa: BLE001  # raised to the caller by `failed`; gRPC would only log it
                    self.failure = error
                    message = None
            if self._attempt is not None:
                self._attempt.progress.moved()
            if message is None:
                break
            yield message
        if self.failure is not None:
            self.cancel()
