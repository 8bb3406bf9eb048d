"""AsyncCompressClient: the client for asyncio, the twin of `client.CompressClient`; `aio_stream` has its streams.

A thin shell around `_call`: no logic beyond await. Belongs to the event loop of its first call.
"""

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import grpc
from graphkv_proto import messages

from graphkv.terms.capabilities import Capabilities
from graphkv.terms.errors import GraphKVError, invalid
from graphkv.terms.policy import Policy
from graphkv.terms.rope import Rope
from graphkv.terms.selection import Selection
from graphkv_client._arrays import Array
from graphkv_client._attempts import Attempt
from graphkv_client._call import Selecting, check_encoding, selecting
from graphkv_client._channel import closed_error, error_of
from graphkv_client._fallback import check_possible, covers
from graphkv_client._feed import Feed
from graphkv_client._inputs import CallTerms
from graphkv_client._retry import Tries
from graphkv_client.aio_fleet import AsyncFleet
from graphkv_client.aio_stream import AsyncLayerStream, Exchange, is_task_cancelled, off_loop
from graphkv_client.options import (
    DEFAULT_ATTEMPT_TIMEOUT,
    DEFAULT_ATTEMPTS,
    DEFAULT_BUFFERED_BYTES,
    DEFAULT_TIMEOUT,
    ClientOptions,
    Observer,
    check_timeout,
)

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
        locate: bool = True,
        attempt_timeout: float = DEFAULT_ATTEMPT_TIMEOUT,
        max_attempts: int = DEFAULT_ATTEMPTS,
        on_unavailable: str = "raise",
        metrics: Observer | None = None,
    ) -> None:
        self._options = ClientOptions(
            address=address,
            timeout=timeout,
            max_buffered_bytes=max_buffered_bytes,
            locate=locate,
            attempt_timeout=attempt_timeout,
            max_attempts=max_attempts,
            on_unavailable=on_unavailable,
            metrics=metrics,
        )
        check_possible(on_unavailable)
        self._fleet = AsyncFleet(self._options)
        self._loop: asyncio.AbstractEventLoop | None = None  # of the first call

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and the calls that still run. A second time does nothing; any other use raises."""
        await self._fleet.close()

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
        self._check_loop()
        call = await self._fleet.call(limit)
        while True:
            attempt: Attempt | None = None
            try:
                with self._fleet.attempt(call) as attempt:
                    await self._exchanged(plan, attempt, call)
                return plan.result(seconds=time.monotonic() - started, attempts=call.attempts)
            except GraphKVError as error:
                if await self._fleet.again(call, error, attempt):
                    plan = plan.again()
                    continue
                own_fault = attempt is not None and attempt.own_fault
                if own_fault or not self._options.falls_back or not covers(error):
                    raise
            self._fleet.fell_back()
            choose = partial(plan.instead, self._options.on_unavailable, attempts=call.attempts)
            return await asyncio.to_thread(choose, seconds=time.monotonic() - started)

    async def _exchanged(self, plan: Selecting, attempt: Attempt, call: Tries) -> None:
        """All messages to one replica, all answers back. Raises GraphKVError, or CancelledError where the task was."""
        exchange = Exchange(plan.call, attempt)
        try:
            async for response in exchange.answers(off_loop(plan.requests()), call.remaining):
                plan.call.fold(response)
            plan.call.close()
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
        self._check_loop()
        return AsyncLayerStream(self._fleet, feed, encoding, limit, self._options)

    async def capabilities(self, *, timeout: float | None = None) -> Capabilities:  # noqa: ASYNC109  # as above
        """What the replica that answers can do and how much it takes. Raises GraphKVError where none answers."""
        limit = self._limit(timeout)
        self._check_loop()
        return await self._capabilities(await self._fleet.call(limit))

    async def _capabilities(self, call: Tries) -> Capabilities:
        while True:
            attempt: Attempt | None = None
            try:
                with self._fleet.attempt(call) as attempt:
                    return messages.read_capabilities(await self._asked(attempt, call))
            except GraphKVError as error:
                if not await self._fleet.again(call, error, attempt):
                    raise

    async def _asked(self, attempt: Attempt, call: Tries) -> Any:
        """One replica's answer for its capabilities. Raises GraphKVError, or CancelledError where the task was."""
        try:
            return await attempt.line.capabilities(messages.write_capabilities_request(), timeout=self._fleet.patience(attempt))
        except grpc.aio.UsageError as error:  # gRPC's word for a closed channel
            raise closed_error("client") from error
        except grpc.RpcError as error:
            raise self._fleet.unanswered(attempt, error_of(error)) from error
        except asyncio.CancelledError as error:
            if is_task_cancelled():
                raise
            attempt.own_fault = True
            raise closed_error("client") from error

    async def ping(self, *, timeout: float | None = None) -> float:  # noqa: ASYNC109  # as above
        """Seconds from here to the service and back. Raises UnavailableError where none answers."""
        limit = self._limit(timeout)
        self._check_loop()
        call = await self._fleet.call(limit)
        started = time.monotonic()
        await self._capabilities(call)
        return time.monotonic() - started

    def _check_loop(self) -> None:
        """Raises InvalidInputError outside of the event loop of the first call."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is None or self._loop not in (None, running):
            which = "outside of an event loop" if running is None else "in another event loop than before"
            raise invalid("client", f"used {which}", "used in the event loop of its first call")
        self._loop = running

    def _limit(self, timeout: float | None) -> float:
        if self._fleet.closed:
            raise closed_error("client")
        return self._options.timeout if timeout is None else check_timeout(timeout)
