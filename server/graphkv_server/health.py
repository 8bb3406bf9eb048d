"""grpc.health.v1: whether new calls should come here. SERVING from the first moment, NOT_SERVING once the replica drains.

Never behind admission and never about load: a replica that is busy is healthy.
"""

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

__all__ = ["Health"]


class Health:
    """Answers Check and Watch for "" (the whole server) and the names of its services."""

    def __init__(self, server: grpc.aio.Server, services: tuple[str, ...]) -> None:
        self._servicer = health_aio.HealthServicer()
        self._services = services
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def serve(self) -> None:
        """Turns every name SERVING."""
        for name in ("", *self._services):
            await self._servicer.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Turns every name NOT_SERVING, for good; those who watch are told."""
        await self._servicer.enter_graceful_shutdown()
