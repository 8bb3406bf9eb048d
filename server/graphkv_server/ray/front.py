"""The front: the address callers are given under `--ray`. It answers Locate, health and capabilities, and passes Select on.

Callers that can reach the replicas go there; what passes through here is slower, and for those who cannot. It stands in the
process that the operator started, and needs neither Serve nor Ray's head. Knows no message but Locate's.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from graphkv_proto import service
from graphkv_proto import v1 as pb
from graphkv_proto.status import to_status
from grpc_reflection.v1alpha import reflection

from graphkv import __version__
from graphkv.terms.errors import Reason, UnavailableError
from graphkv_server.config import Address, ServerConfig
from graphkv_server.directory import Seat, write_seats
from graphkv_server.health import Health
from graphkv_server.listening import StartError, bind, listen, options
from graphkv_server.metrics import Metrics, MetricsListener
from graphkv_server.ray.directory import PERIOD, PeerDirectory
from graphkv_server.ray.passing import passed_on, trailing

__all__ = ["Front"]

Context = grpc.aio.ServicerContext[Any, Any]

_ASK_SECONDS = 10.0
_OF_THE_HOP = ("user-agent", "te", "content-type")
"""Metadata that belongs to one connection."""


class Front:
    """Listens at the configuration's addresses, and knows the replicas from `directory`."""

    def __init__(self, config: ServerConfig, directory: PeerDirectory) -> None:
        self._config = config
        self._directory = directory
        self._random = random.Random()  # noqa: S311  # spreads load, keeps no secret
        self._metrics = Metrics(version=__version__, device="none")
        self._listener: MetricsListener | None = None
        self._server: grpc.aio.Server | None = None
        self._health: Health | None = None
        self._watching: asyncio.Task[None] | None = None
        self.address = config.address
        self.metrics_address: Address | None = None

    async def start(self) -> None:
        """Listens; StartError where an address is taken."""
        self._listener = listen(self._metrics, self._config.metrics_address, self._directory.seats)
        self.metrics_address = self._listener.address if self._listener else None
        server = grpc.aio.server(options=options(self._config.max_message_bytes))
        try:
            self.address = await bind(server, self._config.address)
        except StartError:
            self._close_listener()
            raise
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.SERVICE, self._handlers()),))
        self._health = Health(server, (service.SERVICE,))
        names = (service.SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self._metrics.known_replicas.set_function(lambda: len(self._directory.seats()))
        await self._directory.join()
        await self._health.serve(serving=False)
        await server.start()
        self._server = server
        self._watching = asyncio.create_task(self._watch())

    async def seats(self, number: int) -> list[Seat]:
        """The replicas, once there are so many."""
        while len(seats := self._directory.seats()) < number:  # noqa: ASYNC110  # others find out by asking, too
            await asyncio.sleep(0.05)
        return seats

    async def ready_line(self) -> str:
        """One line for people and programs: addresses, and what the replicas are."""
        (seat, *others) = await self.seats(1)
        answer = await self._call(seat, service.GET_CAPABILITIES)(b"", timeout=_ASK_SECONDS)
        parts = {
            "address": self.address,
            "metrics": self.metrics_address or "none",
            "device": pb.GetCapabilitiesResponse.FromString(answer).devices[0],
            "replicas": 1 + len(others),
        }
        return f"graphkv-serve {__version__} ready: " + " ".join(f"{name}={value}" for name, value in parts.items())

    async def drain(self) -> None:
        """Says that nothing new should come; what runs goes on."""
        if self._watching is not None:
            self._watching.cancel()
        if self._health is not None:
            await self._health.drain()

    async def stop(self) -> None:
        """Ends what is left."""
        if self._server is not None:
            await self._server.stop(1.0)
        await self._directory.leave()
        self._close_listener()

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _watch(self) -> None:
        """SERVING as long as there is a replica."""
        serving = False
        while self._health is not None:
            if serving != bool(self._directory.seats()):
                serving = not serving
                await self._health.serve(serving)
            await asyncio.sleep(PERIOD)

    def _handlers(self) -> dict[str, "grpc.RpcMethodHandler[Any, Any]"]:
        """Messages pass as bytes, but for Locate's."""
        return {
            service.SELECT.name: grpc.stream_stream_rpc_method_handler(self._select),
            service.GET_CAPABILITIES.name: grpc.unary_unary_rpc_method_handler(self._get_capabilities),
            service.LOCATE.name: grpc.unary_unary_rpc_method_handler(
                self._locate,
                request_deserializer=pb.LocateRequest.FromString,
                response_serializer=pb.LocateResponse.SerializeToString,
            ),
        }

    async def _locate(self, request: pb.LocateRequest, context: Context) -> pb.LocateResponse:
        return write_seats(await self._directory.locate(request.group, request.limit))

    async def _get_capabilities(self, request: bytes, context: Context) -> bytes:
        seat = await self._chosen(context)
        ask = self._call(seat, service.GET_CAPABILITIES)
        try:
            return bytes(await ask(request, timeout=context.time_remaining(), metadata=_passed_on(context)))
        except grpc.aio.AioRpcError as error:
            await _ends_like(context, error)
            raise

    async def _select(self, requests: AsyncIterator[bytes], context: Context) -> None:
        seat = await self._chosen(context)
        call = self._call(seat, service.SELECT)(timeout=context.time_remaining(), metadata=_passed_on(context))
        try:
            async with contextlib.aclosing(passed_on(requests, call)) as answers:
                async for answer in answers:
                    await context.write(answer)
        except grpc.aio.AioRpcError as error:
            await _ends_like(context, error)

    async def _chosen(self, context: Context) -> Seat:
        """The less loaded half of the choices, one of them: loads are a moment old, and others choose, too."""
        seats = self._directory.seats()
        if not seats:
            await context.abort(*to_status(UnavailableError("no replica answers", reason=Reason.NO_REPLICA)))
        return self._random.choice(seats[: (len(seats) + 1) // 2])

    def _call(self, seat: Seat, method: "service.Method[Any, Any]") -> Any:
        channel = self._directory.channel(seat.address)
        return (channel.stream_stream if method.streaming else channel.unary_unary)(method.path)


async def _ends_like(context: Context, error: grpc.aio.AioRpcError) -> None:
    await context.abort(error.code(), error.details() or "", trailing(error))


def _passed_on(context: Context) -> list[tuple[str, str | bytes]]:
    given = context.invocation_metadata() or ()
    return [(key, value) for key, value in given if key not in _OF_THE_HOP and not key.startswith("grpc-")]
