"""One replica as Serve runs it: the same Replica as under the CLI, on a port of its own that callers reach directly.

Serve places, watches and replaces it; no call goes through Serve. It drains when Serve stops it.
"""

import asyncio
import contextlib
import ipaddress
import math
import socket
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray.util
from ray import serve

from graphkv_server import config, logs
from graphkv_server.ray.directory import PeerDirectory
from graphkv_server.ray.proxied import Proxied
from graphkv_server.ray.register import Register
from graphkv_server.tuning import tune_process

__all__ = ["ServedReplica"]

_PUT_PERIOD = 10.0
"""Seconds between two entries into the register, which a head that was replaced has lost."""
_TAKE_AWAY_TIMEOUT = 1.0


class ServedReplica(Proxied):
    """What Serve constructs, asks for its health and its load, and ends.

    `settings`: fields of ServerConfig by name; `cpus`: threads of one computation, where they say nothing of it.
    """

    async def __init__(self, settings: Mapping[str, object], cpus: float) -> None:  # type: ignore[misc]
        given = config.from_values(settings)
        self._config = given if given.threads else replace(given, threads=max(1, math.ceil(cpus)))
        logs.configure(given.log_level, sys.__stderr__)  # Serve puts its own in the place of sys.stderr
        tune_process()
        from graphkv_server.replica import Replica  # torch reads the settings made above when it is loaded

        self._register = Register(serve.get_replica_context().app_name)
        self._replica = Replica(self._config, directory=PeerDirectory(self._register.read), host=_this_host())
        await self._replica.start()
        self._replica.watch_engine()
        self.connect(str(self._replica.address))
        self._putting = asyncio.create_task(self._put())

    def check_health(self) -> None:
        """Raises where the engine should be replaced; an event loop that hangs does not answer at all."""
        self._replica.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the policy of `autoscaling` reads."""
        return {"bytes_ratio": self._replica.seat().load, "rows": float(self._replica.rows)}

    def record_replica_metadata(self) -> dict[str, str]:
        """What Serve tells about this replica to who asks it for one."""
        seat = self._replica.seat()
        return {"replica": seat.replica, "address": seat.address, "metrics_address": seat.metrics_address}

    async def __del__(self) -> None:
        """Drains: Serve calls it when the replica is to stop, and waits for it."""
        replica: Any = getattr(self, "_replica", None)
        if replica is None:  # it never came up
            return
        self._putting.cancel()
        with contextlib.suppress(Exception):  # the head is away: the others find out by themselves
            await asyncio.wait_for(self._register.take_away(replica.seat().address), _TAKE_AWAY_TIMEOUT)
        self._register.close()
        await self.disconnect()
        await replica.drain(self._config.grace)
        await replica.stop()

    async def _put(self) -> None:
        while True:
            try:
                await self._register.put(self._replica.seat().address)
            except Exception as error:  # noqa: BLE001  # the head is away: next time
                logs.event("register_failed", level="warning", kind=type(error).__name__, text=str(error))
            await asyncio.sleep(_PUT_PERIOD)


def _this_host() -> str:
    """What other machines reach this one by: as Ray knows it, unless Ray keeps to the loopback."""
    host = str(ray.util.get_node_ip_address())
    if not ipaddress.ip_address(host).is_loopback:
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only asks which of our addresses would
        except OSError:
            return host
        return str(probe.getsockname()[0])
