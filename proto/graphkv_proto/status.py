"""ONE table, used by both ends: error class <-> gRPC status code <-> reason. Details travel as google.rpc messages.

A status without our details comes from gRPC itself or from something between the two ends; its code alone then tells the
class, and what it means here is the table's first reason.
"""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from graphkv.terms.errors import (
    AccessError,
    DeadlineError,
    GraphKVError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    Reason,
    UnavailableError,
)

__all__ = ["DETAILS_KEY", "DOMAIN", "STATUS", "from_status", "to_status"]

DOMAIN = "graphkv"
DETAILS_KEY = "grpc-status-details-bin"
"""The trailing metadata that holds a google.rpc.Status, by gRPC's convention."""
_Code = grpc.StatusCode
STATUS: Mapping[grpc.StatusCode, tuple[type[GraphKVError], tuple[Reason, ...]]] = MappingProxyType({
    _Code.INVALID_ARGUMENT: (InvalidInputError, (
        Reason.BAD_SHAPE, Reason.BAD_POLICY, Reason.NON_FINITE, Reason.ROPE_MISSING, Reason.BAD_LAYOUT, Reason.INCOMPLETE,
        Reason.TOO_LARGE, Reason.FINGERPRINT,
    )),
    _Code.UNIMPLEMENTED: (InvalidInputError, (Reason.UNKNOWN_NAME,)),
    _Code.NOT_FOUND: (InvalidInputError, (Reason.UNKNOWN_REGION,)),
    _Code.FAILED_PRECONDITION: (InvalidInputError, (Reason.SHARD_MISMATCH, Reason.SHARD_ELSEWHERE)),
    _Code.RESOURCE_EXHAUSTED: (OverloadedError, (Reason.OVERLOADED, Reason.OUT_OF_MEMORY)),
    _Code.UNAVAILABLE: (UnavailableError, (Reason.NO_REPLICA, Reason.DRAINING)),
    _Code.DATA_LOSS: (UnavailableError, (Reason.CHECKSUM,)),
    _Code.DEADLINE_EXCEEDED: (DeadlineError, (Reason.EXPIRED, Reason.SLOW_CLIENT)),
    _Code.PERMISSION_DENIED: (AccessError, (Reason.FORBIDDEN,)),
    _Code.UNAUTHENTICATED: (AccessError, (Reason.NO_CREDENTIAL,)),
    _Code.INTERNAL: (InternalError, (Reason.BUG,)),
})  # fmt: skip
"""The first code of a class serves its reasons that are not listed; a code's first reason is that of a bare status."""
_CODE_OF = {(kind, str(reason)): code for code, (kind, reasons) in STATUS.items() for reason in reasons}
_FIRST_CODE: dict[type[GraphKVError], grpc.StatusCode] = {}
for _code, (_kind, _) in STATUS.items():
    _FIRST_CODE.setdefault(_kind, _code)
_FOREIGN = {
    # The call ended on the way, or by somebody's wish between the two ends; ours never send it.
    _Code.CANCELLED: _Code.UNAVAILABLE,
    _Code.ABORTED: _Code.UNAVAILABLE,
    # What a handler raised, in a server that is not ours or from a newer grpc.
    _Code.UNKNOWN: _Code.INTERNAL,
}
_MAX_TEXT = 1024
"""Bytes of a text: it travels percent-encoded and twice in the details, and gRPC refuses metadata beyond 8 KiB."""
_MAX_RETRY = 3600.0 * 24

Metadata = tuple[tuple[str, str | bytes], ...]


def to_status(error: GraphKVError) -> tuple[grpc.StatusCode, str, Metadata]:
    """The status code, message and trailing metadata that carry the error; what `context.abort` takes.

    Texts longer than 1 KiB are cut. An error of the root class itself travels as INTERNAL.
    """
    kind = next((each for each in _FIRST_CODE if isinstance(error, each)), InternalError)
    code = _CODE_OF.get((kind, error.reason), _FIRST_CODE[kind])
    message = _cut(error.message)
    info = error_details_pb2.ErrorInfo(reason=_cut(error.reason), domain=DOMAIN)
    info.metadata["retryable"] = str(error.retryable).lower()
    if error.request_id is not None:
        info.metadata["request_id"] = _cut(error.request_id)
    details: list[Any] = [info]
    if error.argument is not None:
        info.metadata["argument"] = _cut(error.argument)
        violation = error_details_pb2.BadRequest.FieldViolation(field=_cut(error.argument), description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None and math.isfinite(error.retry_after):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(min(max(error.retry_after, 0.0), _MAX_RETRY) * 1e9))
        details.append(retry)
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return code, message, ((DETAILS_KEY, status.SerializeToString()),)


def from_status(
    code: grpc.StatusCode | None,
    message: str | None,
    trailing_metadata: Iterable[Any] | None = None,
    request_id: str | None = None,
) -> GraphKVError:
    """The error that a status carries, whoever sent it.

    trailing_metadata: grpc's or grpc.aio's, or None. request_id: the caller's own, where the status names none. Details
    that cannot be read, and those of other domains, count as absent.
    """
    listed = _FOREIGN.get(code, code) if code is not None else None
    kind, reasons = STATUS.get(listed, STATUS[_Code.INTERNAL]) if listed is not None else STATUS[_Code.INTERNAL]
    text = message or (f"the call ended with {code.name}" if code is not None else "the call ended without a status")
    info, violated, retry_after = _details(trailing_metadata)
    if info is None:
        return kind(text, reason=reasons[0], argument=violated, retry_after=retry_after, request_id=request_id)
    said = info.metadata
    return kind(
        text,
        reason=info.reason,
        retryable=said["retryable"] == "true" if "retryable" in said else None,
        argument=said.get("argument", violated),
        retry_after=retry_after,
        request_id=said.get("request_id", request_id),
    )


def _details(trailing_metadata: Iterable[Any] | None) -> tuple[error_details_pb2.ErrorInfo | None, str | None, float | None]:
    """Our ErrorInfo, the first field that was violated, and the seconds to wait; None where absent."""
    info, violated, retry_after = None, None, None
    try:
        for detail in _status(trailing_metadata).details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                given = error_details_pb2.ErrorInfo.FromString(detail.value)
                info = given if given.domain == DOMAIN else info
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                fields = error_details_pb2.BadRequest.FromString(detail.value).field_violations
                violated = fields[0].field if fields else violated
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_after = max(0.0, delay.seconds + delay.nanos / 1e9)
    except DecodeError:
        pass
    return info, violated, retry_after


def _status(trailing_metadata: Iterable[Any] | None) -> status_pb2.Status:
    for key, value in trailing_metadata or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return status_pb2.Status()


def _cut(text: str) -> str:
    """The text as protobuf and gRPC can carry it: valid UTF-8, not too long."""
    return text.encode("utf-8", "replace")[:_MAX_TEXT].decode("utf-8", "ignore")
