"""The service through Serve's own gRPC proxy: each call it brings is passed on to the replica's own port.

For callers of a cluster that has no front: they ask the proxy to Locate, and go to the replicas. Select through it is slow,
for callers that reach nothing else. A Serve config names `graphkv_server.ray:add_compression` in its `grpc_servicer_functions`.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from graphkv_proto import service
from graphkv_proto import v1 as pb

from graphkv_server.ray.directory import CHANNEL_OPTIONS
from graphkv_server.ray.passing import passed_on, trailing

__all__ = ["Proxied", "add_compression"]


class Proxied:
    """The methods as the proxy calls them, by the names of the RPCs; `context` is Serve's, which carries the status back."""

    _channel: grpc.aio.Channel | None = None

    def connect(self, address: str) -> None:
        """Where the replica itself listens."""
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)

    async def disconnect(self) -> None:
        """Ends what still passes."""
        if self._channel is not None:
            await self._channel.close()

    async def Locate(self, request: pb.LocateRequest, grpc_context: Any) -> pb.LocateResponse:  # noqa: N802
        """Which replicas to call."""
        answer: pb.LocateResponse = await self._unary(service.LOCATE, request, grpc_context)
        return answer

    async def GetCapabilities(  # noqa: N802
        self, request: pb.GetCapabilitiesRequest, grpc_context: Any
    ) -> pb.GetCapabilitiesResponse:
        """What this replica can do."""
        answer: pb.GetCapabilitiesResponse = await self._unary(service.GET_CAPABILITIES, request, grpc_context)
        return answer

    async def Select(  # noqa: N802
        self, requests: AsyncIterator[pb.SelectRequest], grpc_context: Any
    ) -> AsyncIterator[pb.SelectResponse]:
        """Prompts in, one message per layer out."""
        call = service.multicallable(self._channel, service.SELECT)()
        try:
            async with contextlib.aclosing(passed_on(requests, call)) as answers:
                async for answer in answers:
                    yield answer
        except grpc.aio.AioRpcError as error:
            _ends_like(grpc_context, error)
            raise

    async def _unary(self, method: "service.Method[Any, Any]", request: Any, grpc_context: Any) -> Any:
        try:
            return await service.multicallable(self._channel, method)(request)
        except grpc.aio.AioRpcError as error:
            _ends_like(grpc_context, error)
            raise


def add_compression(servicer: Any, server: Any) -> None:
    """Tells the proxy's server which methods there are, as generated code would; who answers is Serve's matter."""
    server.add_generic_rpc_handlers(
        (service.generic_handler({method: getattr(servicer, method.name) for method in service.METHODS}),)
    )


def _ends_like(context: Any, error: grpc.aio.AioRpcError) -> None:
    context.set_code(error.code())
    context.set_details(error.details() or "")
    context.set_trailing_metadata(list(trailing(error)))
