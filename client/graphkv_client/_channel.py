"""Channels and what goes wrong on them: gRPC's settings for both clients, and its errors as ours.

No gRPC type leaves this package: every failed call becomes a GraphKVError, with gRPC's error as its cause.
"""

import ipaddress
import socket
from typing import Any

import grpc
from graphkv_proto.status import from_status

from graphkv.terms.errors import GraphKVError, InvalidInputError
from graphkv.terms.needs import as_given

__all__ = ["closed_error", "error_from", "error_of", "is_cancellation", "is_spread", "open_aio_channel", "open_channel"]

_ARGUMENTS = (
    ("grpc.max_send_message_length", -1),  # messages are cut to the service's limit, not to gRPC's default
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),  # its retries stop for uploads; whether a call may be repeated is ours to know
    ("grpc.keepalive_time_ms", 20_000),  # the two together notice a frozen peer in seconds instead of hours
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # without it the line above is not heeded (grpc#34647)
    ("grpc.service_config_disable_resolution", 1),  # no TXT look-up at every connection
    ("grpc.lb_policy_name", "round_robin"),  # a name with several hosts is all of them, not the first
)


def open_channel(address: str) -> grpc.Channel:
    """A channel that connects at its first call."""
    return grpc.insecure_channel(address, options=_ARGUMENTS)


def open_aio_channel(address: str) -> Any:
    """The same for asyncio; belongs to the running event loop."""
    return grpc.aio.insecure_channel(address, options=_ARGUMENTS)


def is_spread(address: str) -> bool:
    """Whether the address is a name that stands for several hosts, as a headless Kubernetes service is. May ask DNS."""
    scheme, _, rest = address.partition(":")
    if scheme in ("ipv4", "ipv6"):
        return "," in rest
    if scheme in ("unix", "unix-abstract", "vsock"):
        return False
    target = rest.rpartition("/")[2] if scheme == "dns" else address
    host = target.strip("[]") if _is_ip(target.strip("[]")) else target.rpartition(":")[0].strip("[]") or target
    if _is_ip(host):
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    families: dict[int, set[str]] = {}
    for family, _, _, _, place in found:
        families.setdefault(family, set()).add(str(place[0]))
    return any(len(places) > 1 for places in families.values())


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def error_of(error: Any, request_id: str | None = None) -> GraphKVError:
    """The error of a failed call, as ours. `error`: a grpc.RpcError that is a call too, or an AioRpcError."""
    found = error_from(error.code(), error.details(), error.trailing_metadata(), request_id)
    if found.request_id is None:
        found.request_id = request_id
    return found


def error_from(code: Any, details: str | None, trailing_metadata: Any, request_id: str | None) -> GraphKVError:
    """The error that a status carries, in the caller's words."""
    return as_given(from_status(code, details, trailing_metadata, request_id))


def is_cancellation(error: Any) -> bool:
    """Whether a call of gRPC's ended because somebody ended it, as closing its channel does."""
    return isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.CANCELLED


def closed_error(what: str) -> InvalidInputError:
    """Raised by whatever is used after its end."""
    return InvalidInputError(f"the {what} is closed", argument=what, reason="CLOSED")
