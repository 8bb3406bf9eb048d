"""Replica: builds, starts, drains and stops everything one process serves with; the same under the CLI, tests and Ray.

Everything it starts lives in the event loop `start` is called in, apart from the engine's thread and the metrics'
listener.
"""

import asyncio
import os
import secrets
from collections.abc import Callable
from typing import Any

import google_crc32c
import grpc.aio
import torch
from google.protobuf.internal import api_implementation
from graphkv_proto import service
from graphkv_proto.encodings import ENCODINGS
from graphkv_proto.messages import FEATURES, MINOR
from graphkv_proto.tensors import CHUNK_BYTES
from grpc_reflection.v1alpha import reflection

from graphkv import __version__
from graphkv.terms import catalogue
from graphkv.terms.capabilities import Capabilities
from graphkv_server import logs
from graphkv_server.admission import Admission
from graphkv_server.buffers import BufferPool
from graphkv_server.config import Address, ServerConfig
from graphkv_server.directory import Directory, Seat, SingleReplica
from graphkv_server.engine import Engine
from graphkv_server.engine.transfers import pinning_for
from graphkv_server.health import Health
from graphkv_server.listening import StartError, bind, listen, options
from graphkv_server.metrics import Metrics, MetricsListener
from graphkv_server.pulse import Pulse
from graphkv_server.servicer import Servicer

__all__ = ["Replica", "StartError"]

_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  # told apart, not listened on

_LAST_WORDS = 1.0
"""Seconds that statuses of ended calls have to reach their callers when the server stops."""


class Replica:
    """One server, one engine, one device. `start`, then `drain` and `stop`; `stop` alone ends at once.

    `directory`: who else serves (nobody). `host`: what others reach this machine by, where it listens on all its addresses.
    Raises StartError at construction where the device or the protobuf runtime cannot be used.
    """

    def __init__(self, config: ServerConfig, *, directory: Directory | None = None, host: str | None = None) -> None:
        if api_implementation.Type() == "python":
            raise StartError("protobuf runs in pure Python here, which is too slow to serve; install its compiled form")
        self._config = config
        self._host = host
        self.directory = directory if directory is not None else SingleReplica()
        self._draining = False
        self._device = _device(config.device)
        self._threads = (config.threads or _cpus()) if self._device.type == "cpu" else config.threads
        self.name = f"{os.uname().nodename}-{secrets.token_hex(4)}"
        self.metrics = Metrics(version=__version__, device=str(self._device))
        self._pool = BufferPool(config.max_bytes_in_flight, pinning=pinning_for(self._device))
        self.admission = Admission(
            self._pool,
            self.metrics,
            max_bytes=config.max_bytes_in_flight,
            max_requests=config.max_requests_in_flight,
            queue_timeout=config.queue_timeout,
        )
        self._engine = Engine(self._device, self.metrics, max_batch_bytes=config.max_batch_bytes, threads=self._threads)
        self.address = config.address
        self.metrics_address: Address | None = None
        self._listener: MetricsListener | None = None
        self._server: grpc.aio.Server | None = None
        self._health: Health | None = None
        self._servicer: Servicer | None = None
        self._pulse: Pulse | None = None

    async def start(self) -> None:
        """Serves from now on; `address` and `metrics_address` are the real ones. StartError where one is taken."""
        config = self._config
        self._listener = listen(self.metrics, config.metrics_address, self.directory.seats)
        self.metrics_address = self._listener.address if self._listener else None
        server = grpc.aio.server(options=options(config.max_message_bytes))
        try:
            self.address = await bind(server, config.address)
        except StartError:
            self._close_listener()
            raise
        self._servicer = Servicer(
            self.admission,
            self._engine,
            self.metrics,
            capabilities=self._capabilities(),
            directory=self.directory,
            stall_timeout=config.stall_timeout,
        )
        handlers: dict[service.Method[Any, Any], Callable[..., Any]] = {
            service.SELECT: self._servicer.select,
            service.GET_CAPABILITIES: self._servicer.get_capabilities,
            service.LOCATE: self._servicer.locate,
        }
        server.add_generic_rpc_handlers((service.generic_handler(handlers), *self.directory.handlers()))
        self._health = Health(server, (service.SERVICE,))
        names = (service.SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self._engine.start()
        await self._health.serve()
        await server.start()
        self._server = server
        await self.directory.join(self.seat)
        self.metrics.known_replicas.set_function(lambda: len(self.directory.seats()))
        if google_crc32c.implementation == "python":
            text = "google-crc32c runs in pure Python here, a hundred times slower; install its compiled form"
            logs.event("slow_checksums", level="warning", text=text)
        logs.event("ready", address=str(self.address), device=str(self._device), replica=self.name)

    def watch_engine(self) -> None:
        """From now on an engine that makes no progress takes the replica out, and its next progress back in."""
        self._pulse = Pulse(self._engine, self.admission, self._paused)
        self._pulse.start()

    def check(self) -> None:
        """Raises StuckError where the watched engine has made no progress for so long, or fails so, that it never will."""
        if self._pulse is not None:
            self._pulse.check()

    def ready_line(self) -> str:
        """One line for people and programs: addresses, device, limits."""
        config = self._config
        parts = {
            "address": self.address,
            "metrics": self.metrics_address or "none",
            "device": self._device,
            "max-bytes-in-flight": _size(config.max_bytes_in_flight),
            "max-requests-in-flight": config.max_requests_in_flight,
            "max-message-bytes": _size(config.max_message_bytes),
        }
        return f"graphkv-serve {__version__} ready: " + " ".join(f"{name}={value}" for name, value in parts.items())

    async def drain(self, grace: float, hurry: asyncio.Event | None = None) -> bool:
        """Health turns NOT_SERVING, new calls are refused, running ones may finish within `grace` seconds.

        Returns whether all did; those that did not end with UNAVAILABLE. `hurry` ends the grace.
        """
        if self._health is None or self._servicer is None:
            return True
        self._draining = True
        self.metrics.draining_ratio.set(1)
        await self._health.drain()
        self._servicer.drain()
        logs.event("draining", requests=self.admission.requests_in_flight, grace=grace)
        idle = asyncio.ensure_future(self.admission.idle())
        hurried = asyncio.ensure_future((hurry or asyncio.Event()).wait())
        try:
            await asyncio.wait((idle, hurried), timeout=grace, return_when=asyncio.FIRST_COMPLETED)
            finished = idle.done()
        finally:
            idle.cancel()
            hurried.cancel()
        if not finished:
            logs.event("grace_over", level="warning", requests=self.admission.requests_in_flight)
            self._servicer.end_all()
        return finished

    async def stop(self) -> None:
        """Ends what is left and gives everything back."""
        if self._pulse is not None:
            await self._pulse.stop()
        await self.directory.leave()
        if self._server is not None:
            await self._server.stop(_LAST_WORDS)
        await self._engine.close()
        self._close_listener()
        self._pool.close()
        logs.event("stopped", in_flight_bytes=self.admission.bytes_in_flight)

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    @property
    def rows(self) -> int:
        """Rows that wait for the engine or are being computed."""
        return self._engine.rows

    def seat(self) -> Seat:
        """This replica as the directory names it."""
        return Seat(
            replica=self.name,
            address=str(self._public(self.address)),
            bytes_in_flight=self.admission.bytes_in_flight,
            max_bytes_in_flight=self._config.max_bytes_in_flight,
            queued_rows=self._engine.rows,
            metrics_address=str(self._public(self.metrics_address) or ""),
            serving=not self._draining and (self._pulse is None or self._pulse.beating),
            draining=self._draining,
        )

    def _public(self, address: Address | None) -> Address | None:
        """What others reach that address by."""
        if address is None or self._host is None or address.host not in _EVERYWHERE:
            return address
        return Address(self._host, address.port)

    async def _paused(self, paused: bool) -> None:
        if self._health is not None and not self._draining:
            await self._health.serve(not paused)

    def _capabilities(self) -> Capabilities:
        device = self._device
        cuda = f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else None
        return Capabilities(
            version=__version__,
            protocol_minor=MINOR,
            replica=self.name,
            device=cuda or str(device),
            max_bytes_in_flight=self._config.max_bytes_in_flight,
            max_message_bytes=self._config.max_message_bytes,
            chunk_bytes=CHUNK_BYTES,
            metrics_address=str(self._public(self.metrics_address) or ""),
            features=FEATURES,
            scorers=tuple(catalogue.SCORERS),
            budget_allocations=tuple(catalogue.BUDGETS),
            granularities=tuple(catalogue.GRANULARITIES),
            signals=tuple(catalogue.SIGNALS),
            updates=tuple(catalogue.UPDATES),
            similarities=tuple(catalogue.SIMILARITIES),
            encodings=tuple(ENCODINGS),
            outputs=tuple(catalogue.OUTPUTS),
        )


def _device(name: str) -> torch.device:
    """The device of the setting; StartError where this machine has none such."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():  # in Python's numbers: torch's are small
        raise StartError(f"--device is {name}, but torch sees {torch.cuda.device_count()} GPUs here")
    return torch.device("cuda:0" if name == "cuda" else name)


def _cpus() -> int:
    """CPUs that this process may use; macOS cannot say, so all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _size(size: int) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        step = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}[unit]
        if size % step == 0:
            return f"{size // step}{unit}"
    return str(size)
