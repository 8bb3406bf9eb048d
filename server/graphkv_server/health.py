"""grpc.health.v1: whether new calls should come here. SERVING from the first moment, NOT_SERVING once the replica drains,
and as long as its engine makes no progress.

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

    async def serve(self, serving: bool = True) -> None:
        """Turns every name SERVING, or NOT_SERVING for the time being; without effect once it drains."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._services):
            await self._servicer.set(name, status)

    async def drain(self) -> None:
        """Turns every name NOT_SERVING, for good; those who watch are told."""
        await self._servicer.enter_graceful_shutdown()
