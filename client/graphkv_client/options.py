"""ClientOptions: how a client behaves, checked once at construction. Reads no environment; knows no gRPC."""

import math
import numbers
from dataclasses import dataclass

from graphkv.terms.errors import invalid

__all__ = ["ClientOptions", "check_timeout", "is_integer"]

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
        object.__setattr__(self, "timeout", check_timeout(self.timeout))  # a numpy float would round the clock
        size = self.max_buffered_bytes
        if not is_integer(size) or size < 1:
            raise invalid("max_buffered_bytes", size, "a positive number of bytes")


def check_timeout(timeout: object) -> float:
    """The timeout in seconds; InvalidInputError where it is no positive, finite number. Every call has a deadline."""
    try:
        seconds = float(timeout) if not isinstance(timeout, bool) and isinstance(timeout, numbers.Real) else math.nan
    except OverflowError:
        seconds = math.inf
    if not 0 < seconds < math.inf:
        raise invalid("timeout", timeout, "a positive, finite number of seconds")
    return seconds


def is_integer(given: object) -> bool:
    """Whether it is a whole number of Python's or numpy's; bools are none."""
    return isinstance(given, numbers.Integral) and not isinstance(given, bool)
