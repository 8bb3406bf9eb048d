"""AsyncCompressClient: the client for asyncio, the twin of `client.CompressClient`; `aio_stream` has its streams.

A thin shell around `_call`: no logic beyond await. Belongs to the event loop of its first call.
"""

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from graphkv_proto import messages, service

from graphkv.terms.capabilities import Capabilities
from graphkv.terms.errors import GraphKVError, invalid
from graphkv.terms.policy import Policy
from graphkv.terms.rope import Rope
from graphkv.terms.selection import Selection
from graphkv_client._arrays import Array
from graphkv_client._call import check_encoding, selecting
from graphkv_client._channel import closed_error, error_of, open_aio_channel
from graphkv_client._feed import Feed
from graphkv_client._inputs import CallTerms
from graphkv_client.aio_stream import AsyncLayerStream, Exchange, off_loop
from graphkv_client.options import DEFAULT_BUFFERED_BYTES, DEFAULT_TIMEOUT, ClientOptions, check_timeout

__all__ = ["AsyncCompressClient"]


class AsyncCompressClient:
    """A client of one GraphKV service, for asyncio. Close it, or use it in `async with`.

    Arguments and errors as `CompressClient`'s. Torch tensors are scored on a thread, so the event loop keeps turning. A
    task that is cancelled cancels its call.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        max_buffered_bytes: int = DEFAULT_BUFFERED_BYTES,
    ) -> None:
        self._options = ClientOptions(address=address, timeout=timeout, max_buffered_bytes=max_buffered_bytes)
        self._opened: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None  # of the first call
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and the calls that still run. A second time does nothing; any other use raises."""
        self._closed = True
        if self._opened is not None:
            channel, self._opened = self._opened, None
            await channel.close()

    async def select(
        self,
        keys: Array | Sequence[Any],
        *,
        policy: Policy,
        queries: Any = None,
        attention: Any = None,
        scores: Any = None,
        values: Any = None,
        query_mean: Any = None,
        query_covariance: Any = None,
        similarity_keys: Any = None,
        positions: Any = None,
        pinned: Any = None,
        rope: Rope | None = None,
        layout: str = "HND",
        outputs: Sequence[str] = (),
        encoding: str = "auto",
        timeout: float | None = None,  # noqa: ASYNC109  # the service has to know the deadline too
    ) -> Selection | list[Selection]:
        """The tokens to keep, as `graphkv.select` would choose them. Arguments, answer and errors: `CompressClient.select`."""
        started = time.monotonic()
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
        limit = self._limit(timeout)
        plan = selecting(given, terms=CallTerms(policy, rope, layout, outputs), pinned=pinned, encoding=encoding)
        exchange = Exchange(plan.call)
        try:
            async for response in exchange.start(self._method(service.SELECT), off_loop(plan.requests()), limit):
                plan.call.fold(response)
            return plan.result(seconds=time.monotonic() - started)
        except (grpc.RpcError, GraphKVError, asyncio.CancelledError) as error:
            found = exchange.failed(error)
            if found is error:
                raise
            raise found from error
        finally:
            exchange.cancel()

    def stream(
        self,
        *,
        num_layers: int,
        policy: Policy,
        num_tokens: int | Sequence[int] | None = None,
        pinned: Any = None,
        rope: Rope | None = None,
        layout: str = "HND",
        outputs: Sequence[str] = (),
        encoding: str = "auto",
        timeout: float | None = None,
    ) -> AsyncLayerStream:
        """A stream of layers, for a prefill that is still running. Arguments and errors: `CompressClient.stream`."""
        limit = self._limit(timeout)
        check_encoding(encoding)
        feed = Feed(CallTerms(policy, rope, layout, outputs), layers=num_layers, tokens=num_tokens, pinned=pinned)
        return AsyncLayerStream(self._method(service.SELECT), feed, encoding, limit, self._options.max_buffered_bytes)

    async def capabilities(self, *, timeout: float | None = None) -> Capabilities:  # noqa: ASYNC109  # as above
        """What the replica that answers can do and how much it takes. Raises GraphKVError where none answers."""
        limit = self._limit(timeout)
        try:
            method = self._method(service.GET_CAPABILITIES)
            answer = await method(messages.write_capabilities_request(), timeout=limit)
        except grpc.RpcError as error:
            raise error_of(error) from error
        return messages.read_capabilities(answer)

    async def ping(self, *, timeout: float | None = None) -> float:  # noqa: ASYNC109  # as above
        """Seconds from here to the service and back. Raises UnavailableError where none answers."""
        started = time.monotonic()
        await self.capabilities(timeout=timeout)
        return time.monotonic() - started

    def _method(self, method: Any) -> Any:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is None or self._loop not in (None, running):
            which = "outside of an event loop" if running is None else "in another event loop than before"
            raise invalid("client", f"used {which}", "used in the event loop of its first call")
        if self._opened is None:
            self._opened, self._loop = open_aio_channel(self._options.address), running
        return service.multicallable(self._opened, method)

    def _limit(self, timeout: float | None) -> float:
        if self._closed:
            raise closed_error("client")
        return self._options.timeout if timeout is None else check_timeout(timeout)
