"""Every error this project raises on purpose, in the library, the client and the server alike.

GraphKVError                       reason, retryable; argument, retry_after (seconds), request_id
├── InvalidInputError (ValueError)     the caller's mistake; the same call can never succeed
├── OverloadedError                    refused by admission; retry_after says when to come back
├── UnavailableError                   no replica answered, or the way there broke; another try may succeed
├── DeadlineError (TimeoutError)       time ran out, in the queue or on the way
├── AccessError (PermissionError)      not for you
└── InternalError                      our mistake; report the request id

One constructor for the whole tree: the wire rebuilds any of them in one place, and all of them pickle (they travel
between processes). Knows nothing of gRPC: `graphkv_proto.status` maps these classes to status codes and back.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import ClassVar

__all__ = [
    "AccessError",
    "DeadlineError",
    "GraphKVError",
    "InternalError",
    "InvalidInputError",
    "OverloadedError",
    "Reason",
    "UnavailableError",
    "invalid",
    "unknown_name",
]


class Reason(StrEnum):
    """Why a call failed, as a stable word for programs; the message is for people. A newer server may send others."""

    BAD_POLICY = "BAD_POLICY"
    BAD_SHAPE = "BAD_SHAPE"
    NON_FINITE = "NON_FINITE"
    ROPE_MISSING = "ROPE_MISSING"
    BAD_LAYOUT = "BAD_LAYOUT"
    INCOMPLETE = "INCOMPLETE"
    TOO_LARGE = "TOO_LARGE"
    FINGERPRINT = "FINGERPRINT"
    UNKNOWN_NAME = "UNKNOWN_NAME"
    UNKNOWN_REGION = "UNKNOWN_REGION"
    SHARD_ELSEWHERE = "SHARD_ELSEWHERE"
    SHARD_MISMATCH = "SHARD_MISMATCH"
    OVERLOADED = "OVERLOADED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DRAINING = "DRAINING"
    NO_REPLICA = "NO_REPLICA"
    CHECKSUM = "CHECKSUM"
    EXPIRED = "EXPIRED"
    SLOW_CLIENT = "SLOW_CLIENT"
    NO_CREDENTIAL = "NO_CREDENTIAL"
    FORBIDDEN = "FORBIDDEN"
    BUG = "BUG"


class GraphKVError(Exception):
    """The root of the tree: catch it to catch everything this project raises on purpose.

    `reason` is a `Reason` or, from a newer server, a word not known here; `retryable` says whether the same call may
    succeed later; `argument` names the offending argument, where there is one; `retry_after` is in seconds.
    """

    default_reason: ClassVar[str] = Reason.BUG
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        retryable: bool | None = None,
        argument: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = self.default_reason if reason is None else str(reason)
        self.retryable = self.default_retryable if retryable is None else retryable
        self.argument = argument
        self.retry_after = retry_after
        self.request_id = request_id

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        """Pickles by its one constructor; `Exception` alone would forget the keyword arguments."""
        fields = {
            "reason": self.reason,
            "retryable": self.retryable,
            "argument": self.argument,
            "retry_after": self.retry_after,
            "request_id": self.request_id,
        }
        return _rebuild, (type(self), self.message, fields)


def _rebuild(kind: type[GraphKVError], message: str, fields: dict[str, object]) -> GraphKVError:
    return kind(message, **fields)  # type: ignore[arg-type]  # the fields are the constructor's own, by name


class InvalidInputError(GraphKVError, ValueError):
    """The caller's mistake: the same call can never succeed. `argument` names the field."""

    default_reason = Reason.BAD_SHAPE


class OverloadedError(GraphKVError):
    """Refused by admission; `retry_after` (seconds) says when to come back."""

    default_reason = Reason.OVERLOADED
    default_retryable = True


class UnavailableError(GraphKVError):
    """No replica answered, or the answer was lost on the way; another try may succeed."""

    default_reason = Reason.NO_REPLICA
    default_retryable = True


class DeadlineError(GraphKVError, TimeoutError):
    """Time ran out, in the queue or on the way."""

    default_reason = Reason.EXPIRED


class AccessError(GraphKVError, PermissionError):
    """The caller has no credential, or may not do this."""

    default_reason = Reason.FORBIDDEN


class InternalError(GraphKVError):
    """Our mistake; report the request id."""

    default_reason = Reason.BUG


def invalid(argument: str, given: object, allowed: str, *, reason: Reason = Reason.BAD_POLICY) -> InvalidInputError:
    """The one way to say no: `raise invalid("budget", budget, "a positive integer or a ratio in (0, 1]")`."""
    return InvalidInputError(f"{argument} is {given!r}; it must be {allowed}", argument=argument, reason=reason)


def unknown_name(argument: str, given: object, known: Iterable[str]) -> InvalidInputError:
    """A name this version does not have, with the ones it has: `unknown_name("scorer", "h3o", SCORERS)`."""
    names = ", ".join(sorted(known))
    return invalid(argument, given, f"one of {names}", reason=Reason.UNKNOWN_NAME)
