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
from graphkv_server.directory import Seat, SingleReplica
from graphkv_server.engine import Engine
from graphkv_server.engine.transfers import pinning_for
from graphkv_server.health import Health
from graphkv_server.metrics import Metrics, MetricsListener
from graphkv_server.servicer import Servicer

__all__ = ["Replica", "StartError"]

_LAST_WORDS = 1.0
"""Seconds that statuses of ended calls have to reach their callers when the server stops."""


class StartError(Exception):
    """The replica cannot run with these settings on this machine; the message says which and why."""


class Replica:
    """One server, one engine, one device. `start`, then `drain` and `stop`; `stop` alone ends at once.

    Raises StartError at construction where the device or the protobuf runtime cannot be used.
    """

    def __init__(self, config: ServerConfig) -> None:
        if api_implementation.Type() == "python":
            raise StartError("protobuf runs in pure Python here, which is too slow to serve; install its compiled form")
        self._config = config
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

    async def start(self) -> None:
        """Serves from now on; `address` and `metrics_address` are the real ones. StartError where one is taken."""
        config = self._config
        if config.metrics_address is not None:
            try:
                self._listener = MetricsListener(self.metrics, config.metrics_address)
            except OSError as error:
                reason = error.strerror or str(error)
                raise StartError(f"cannot listen on {config.metrics_address} (--metrics-address): {reason}") from None
            self.metrics_address = self._listener.address
        server = grpc.aio.server(options=_options(config))
        try:
            port = server.add_insecure_port(str(config.address))
        except RuntimeError:
            self._close_listener()
            raise StartError(f"cannot listen on {config.address} (--address): {await _why_not(config.address)}") from None
        self.address = Address(config.address.host, port)
        self._servicer = Servicer(
            self.admission,
            self._engine,
            self.metrics,
            capabilities=self._capabilities(),
            directory=SingleReplica(self._seat),
            stall_timeout=config.stall_timeout,
        )
        handlers: dict[service.Method[Any, Any], Callable[..., Any]] = {
            service.SELECT: self._servicer.select,
            service.GET_CAPABILITIES: self._servicer.get_capabilities,
            service.LOCATE: self._servicer.locate,
        }
        server.add_generic_rpc_handlers((service.generic_handler(handlers),))
        self._health = Health(server, (service.SERVICE,))
        names = (service.SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self._engine.start()
        await self._health.serve()
        await server.start()
        self._server = server
        if google_crc32c.implementation == "python":
            text = "google-crc32c runs in pure Python here, a hundred times slower; install its compiled form"
            logs.event("slow_checksums", level="warning", text=text)
        logs.event("ready", address=str(self.address), device=str(self._device), replica=self.name)

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

    def _seat(self) -> Seat:
        held = self.admission.bytes_in_flight
        return Seat(self.name, str(self.address), held, self._config.max_bytes_in_flight)

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
            metrics_address=str(self.metrics_address or ""),
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


async def _why_not(address: Address) -> str:
    """Why nothing can listen there, as far as it can be told: gRPC does not say."""
    try:
        await asyncio.get_running_loop().getaddrinfo(address.host, address.port)
    except (OSError, UnicodeError):
        return "there is no such host"
    return "the port is taken, or the address is not of this machine"


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    """gRPC's settings: its defaults let a frozen caller hold a call for a minute, and any caller open what it likes."""
    return [
        ("grpc.so_reuseport", 0),  # else a second server on the same port starts, and takes half of the calls
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.bdp_probe", 0),  # else each call that waits for room has 10 MiB and more of its messages buffered
        ("grpc.max_concurrent_streams", 100),
        ("grpc.max_allowed_incoming_connections", 1024),
        ("grpc.server_handshake_timeout_ms", 5_000),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),  # its default of 60 s overrides keepalive_timeout_ms
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # a caller that waits may ping, too
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: tensors do not shrink, bombs do
    ]


def _size(size: int) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        step = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}[unit]
        if size % step == 0:
            return f"{size // step}{unit}"
    return str(size)
