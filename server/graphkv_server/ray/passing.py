"""Passing a Select call on to a replica: the caller's messages up, answers down, its status and details as they are."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc.aio

__all__ = ["passed_on", "trailing"]


async def passed_on(requests: AsyncIterator[Any], call: Any) -> AsyncGenerator[Any, None]:
    """The answers of `call`, a stream to a replica, while the messages go up no faster than it takes them.

    Raises AioRpcError as the replica ended it; leaving early cancels.
    """
    upward = asyncio.create_task(_upward(requests, call))
    try:
        async for answer in call:
            yield answer
    finally:
        upward.cancel()
        call.cancel()
        await asyncio.wait((upward,))


def trailing(error: grpc.aio.AioRpcError) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata an error came with: the reason is there."""
    return tuple((key, value) for key, value in error.trailing_metadata() or ())


async def _upward(requests: AsyncIterator[Any], call: Any) -> None:
    # Where the call is over, who reads its answers says why.
    with contextlib.suppress(grpc.aio.BaseError, asyncio.InvalidStateError):
        async for message in requests:
            await call.write(message)
        await call.done_writing()
