"""ClientOptions: how a client behaves, checked once at construction. Reads no environment; knows no gRPC."""

import math
from dataclasses import dataclass

from graphkv.terms.errors import invalid

__all__ = ["ClientOptions", "check_timeout"]

DEFAULT_TIMEOUT = 30.0
DEFAULT_BUFFERED_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Where the service is and what a call may take.

    address: "host:port", or any gRPC target ("dns:///graphkv:50051", "unix:/run/graphkv.sock").
    timeout: seconds a call may take, from its start (a stream's: from entering its block) to its last answer.
    max_buffered_bytes: what one stream may hold in copies of its own (`put(copy=True)`).
    Raises InvalidInputError naming the option.
    """

    address: str
    timeout: float = DEFAULT_TIMEOUT
    max_buffered_bytes: int = DEFAULT_BUFFERED_BYTES

    def __post_init__(self) -> None:
        if not isinstance(self.address, str) or not self.address.strip():
            raise invalid("address", self.address, '"host:port" or a gRPC target')
        check_timeout(self.timeout)
        size = self.max_buffered_bytes
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise invalid("max_buffered_bytes", size, "a positive number of bytes")


def check_timeout(timeout: object) -> float:
    """The timeout in seconds; InvalidInputError where it is no positive, finite number. Every call has a deadline."""
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise invalid("timeout", timeout, "a positive, finite number of seconds")
    return float(timeout)
