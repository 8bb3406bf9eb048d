"""Where a process listens: its gRPC port and its metrics, with the settings that every server of ours has."""

import asyncio
from collections.abc import Callable, Iterable

import grpc.aio

from graphkv_server.config import Address
from graphkv_server.directory import Seat
from graphkv_server.metrics import Metrics, MetricsListener

__all__ = ["StartError", "bind", "listen", "options"]


class StartError(Exception):
    """The service cannot run with these settings on this machine; the message says which and why."""


def listen(metrics: Metrics, address: Address | None, seats: Callable[[], Iterable[Seat]]) -> MetricsListener | None:
    """The listener for operators, if one is wanted; StartError where its address is taken."""
    if address is None:
        return None
    try:
        return MetricsListener(metrics.registry, address, seats)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartError(f"cannot listen on {address} (--metrics-address): {reason}") from None


async def bind(server: grpc.aio.Server, address: Address) -> Address:
    """Lets the server listen there; returns the address with its real port. StartError where it is taken."""
    try:
        return Address(address.host, server.add_insecure_port(str(address)))
    except RuntimeError:
        raise StartError(f"cannot listen on {address} (--address): {await _why_not(address)}") from None


def options(max_message_bytes: int) -> list[tuple[str, int]]:
    """gRPC's settings: its defaults let a frozen caller hold a call for a minute, and any caller open what it likes."""
    return [
        ("grpc.so_reuseport", 0),  # else a second server on the same port starts, and takes half of the calls
        ("grpc.max_receive_message_length", max_message_bytes),
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


async def _why_not(address: Address) -> str:
    """Why nothing can listen there, as far as it can be told: gRPC does not say."""
    try:
        await asyncio.get_running_loop().getaddrinfo(address.host, address.port)
    except (OSError, UnicodeError):
        return "there is no such host"
    return "the port is taken, or the address is not of this machine"
