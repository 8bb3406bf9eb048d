"""ClientOptions: how a client behaves, checked once at construction. Reads no environment; knows no gRPC."""

import math
import numbers
from dataclasses import dataclass
from typing import Protocol

from graphkv.terms.errors import invalid

__all__ = ["ClientOptions", "Observer", "check_timeout", "is_integer"]

DEFAULT_TIMEOUT = 30.0
DEFAULT_BUFFERED_BYTES = 256 * 2**20
DEFAULT_ATTEMPT_TIMEOUT = 5.0
DEFAULT_ATTEMPTS = 4
ON_UNAVAILABLE = ("raise", "local", "keep_all")


class Observer(Protocol):
    """Who is told what becomes of calls; `graphkv_client.metrics.ClientMetrics` counts it for Prometheus.

    Its methods are called on any thread and must not raise.
    """

    def attempted(self, outcome: str) -> None:
        """One attempt of a call ended: "ok", or the reason it failed for."""
        ...

    def fell_back(self, choice: str) -> None:
        """A call was answered without the service: "local" or "keep_all"."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Where the service is and what a call may take.

    address: "host:port", or any gRPC target ("dns:///graphkv:50051", "unix:/run/graphkv.sock").
    timeout: seconds a call may take, from its start (a stream's: from entering its block) to its last answer.
    max_buffered_bytes: what one stream may hold in copies of its own (`put(copy=True)`).
    locate: whether to ask the service for its replicas and call them directly; else every call goes to the address.
    attempt_timeout: seconds of silence after which a call leaves a replica for another (half of the call's timeout, where
        that is less).
    max_attempts: how often one call may be sent; 1 turns retries off.
    on_unavailable: what a call does that the service did not answer (unavailable, overloaded, too late): "raise"; "local":
        choose in this process, which needs torch; "keep_all": keep every token.
    metrics: who is told of attempts and fall-backs.
    Raises InvalidInputError naming the option.
    """

    address: str
    timeout: float = DEFAULT_TIMEOUT
    max_buffered_bytes: int = DEFAULT_BUFFERED_BYTES
    locate: bool = True
    attempt_timeout: float = DEFAULT_ATTEMPT_TIMEOUT
    max_attempts: int = DEFAULT_ATTEMPTS
    on_unavailable: str = "raise"
    metrics: Observer | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.address, str) or not self.address.strip():
            raise invalid("address", self.address, '"host:port" or a gRPC target')
        object.__setattr__(self, "timeout", check_timeout(self.timeout))  # a numpy float would round the clock
        object.__setattr__(self, "attempt_timeout", check_timeout(self.attempt_timeout, "attempt_timeout"))
        size = self.max_buffered_bytes
        if not is_integer(size) or size < 1:
            raise invalid("max_buffered_bytes", size, "a positive number of bytes")
        if not is_integer(self.max_attempts) or self.max_attempts < 1:
            raise invalid("max_attempts", self.max_attempts, "an integer >= 1")
        if not isinstance(self.locate, bool):
            raise invalid("locate", self.locate, "True or False")
        if self.on_unavailable not in ON_UNAVAILABLE:
            raise invalid("on_unavailable", self.on_unavailable, "raise, local or keep_all")
        if self.metrics is not None and not all(hasattr(self.metrics, name) for name in ("attempted", "fell_back")):
            raise invalid("metrics", self.metrics, "a graphkv_client.metrics.ClientMetrics, or an object with its methods")

    @property
    def falls_back(self) -> bool:
        """Whether a call is answered even where the service does not."""
        return self.on_unavailable != "raise"


def check_timeout(timeout: object, argument: str = "timeout") -> float:
    """The timeout in seconds; InvalidInputError where it is no positive, finite number. Every call has a deadline."""
    try:
        seconds = float(timeout) if not isinstance(timeout, bool) and isinstance(timeout, numbers.Real) else math.nan
    except OverflowError:
        seconds = math.inf
    if not 0 < seconds < math.inf:
        raise invalid(argument, timeout, "a positive, finite number of seconds")
    return seconds


def is_integer(given: object) -> bool:
    """Whether it is a whole number of Python's or numpy's; bools are none."""
    return isinstance(given, numbers.Integral) and not isinstance(given, bool)
