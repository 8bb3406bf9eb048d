"""The one table of errors: every class and reason crosses unchanged, and what others send is understood."""

import math
import pickle
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from graphkv_proto.status import DETAILS_KEY, STATUS, from_status, to_status

from graphkv.terms.errors import (
    AccessError,
    DeadlineError,
    GraphKVError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    Reason,
    UnavailableError,
    invalid,
)

CODE = grpc.StatusCode
KINDS = (InvalidInputError, OverloadedError, UnavailableError, DeadlineError, AccessError, InternalError)
EXTRAS: dict[str, dict[str, Any]] = {
    "bare": {},
    "argument": {"argument": "policy.budget"},
    "empty argument": {"argument": ""},
    "retry after": {"retry_after": 1.25, "retryable": True},
    "retry at once": {"retry_after": 0.0, "retryable": False},
    "all": {"argument": "keys", "retry_after": 0.1, "retryable": True, "request_id": "a-1"},
}


def crossed(error: GraphKVError, *, through: Any = tuple) -> GraphKVError:
    code, message, trailing = to_status(error)
    return from_status(code, message, through(trailing))


def fields(error: GraphKVError) -> dict[str, Any]:
    names = ("message", "reason", "retryable", "argument", "retry_after", "request_id")
    return {"class": type(error), **{name: getattr(error, name) for name in names}}


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("reason", [*Reason, "A_NEWER_REASON"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_crosses_unchanged(kind: type[GraphKVError], reason: str, extras: str) -> None:
    error = kind(f"budget is 0; ünicode, {reason}\nand lines %", reason=reason, **EXTRAS[extras])
    got = crossed(error)
    assert fields(got) == fields(error)
    assert fields(pickle.loads(pickle.dumps(got))) == fields(error)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_defaults_of_a_class_cross(kind: type[GraphKVError]) -> None:
    assert fields(crossed(kind("so"))) == fields(kind("so"))


def test_the_table_has_every_reason_once_and_every_class() -> None:
    listed = [reason for _, reasons in STATUS.values() for reason in reasons]
    assert sorted(listed) == sorted(Reason)
    assert {kind for kind, _ in STATUS.values()} == set(KINDS) == set(GraphKVError.__subclasses__())


@pytest.mark.parametrize(
    ("kind", "reason", "code"),
    [
        (InvalidInputError, Reason.BAD_POLICY, CODE.INVALID_ARGUMENT),
        (InvalidInputError, Reason.TOO_LARGE, CODE.INVALID_ARGUMENT),
        (InvalidInputError, Reason.FINGERPRINT, CODE.INVALID_ARGUMENT),
        (InvalidInputError, Reason.UNKNOWN_NAME, CODE.UNIMPLEMENTED),
        (InvalidInputError, Reason.UNKNOWN_REGION, CODE.NOT_FOUND),
        (InvalidInputError, Reason.SHARD_ELSEWHERE, CODE.FAILED_PRECONDITION),
        (InvalidInputError, "A_NEWER_REASON", CODE.INVALID_ARGUMENT),
        (OverloadedError, Reason.OUT_OF_MEMORY, CODE.RESOURCE_EXHAUSTED),
        (UnavailableError, Reason.DRAINING, CODE.UNAVAILABLE),
        (UnavailableError, Reason.CHECKSUM, CODE.DATA_LOSS),
        (DeadlineError, Reason.SLOW_CLIENT, CODE.DEADLINE_EXCEEDED),
        (AccessError, Reason.NO_CREDENTIAL, CODE.UNAUTHENTICATED),
        (AccessError, Reason.FORBIDDEN, CODE.PERMISSION_DENIED),
        (InternalError, Reason.BUG, CODE.INTERNAL),
        (InternalError, Reason.BAD_SHAPE, CODE.INTERNAL),
        (GraphKVError, Reason.BUG, CODE.INTERNAL),
    ],
)
def test_codes(kind: type[GraphKVError], reason: str, code: grpc.StatusCode) -> None:
    assert to_status(kind("so", reason=reason))[0] is code


def test_details_are_what_any_grpc_tool_reads() -> None:
    error = invalid("policy.budget", 0, "a positive integer")
    error.request_id, error.retry_after = "a-1", 0.25
    _, message, ((key, data),) = to_status(error)
    status = status_pb2.Status.FromString(data)
    assert (key, status.code, status.message) == ("grpc-status-details-bin", 3, message)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    assert [detail.Unpack(into) for detail, into in zip(status.details, (info, bad, retry), strict=True)] == [True] * 3
    assert (info.reason, info.domain) == ("BAD_POLICY", "graphkv")
    assert dict(info.metadata) == {"argument": "policy.budget", "request_id": "a-1", "retryable": "false"}
    assert [(each.field, each.description) for each in bad.field_violations] == [("policy.budget", message)]
    assert retry.retry_delay == Duration(nanos=250_000_000)


@pytest.mark.parametrize("given", [math.nan, math.inf, -1.0, 1e300], ids=str)
def test_a_wait_that_is_none_does_not_break_the_status(given: float) -> None:
    got = crossed(OverloadedError("full", retry_after=given)).retry_after
    assert got is None or 0.0 <= got <= 24 * 3600


@pytest.mark.parametrize(
    "text", ["x" * 10**6, "é" * 10**6, "\0" * 10**5, "\ud800" * 5000], ids=["long", "accents", "NUL", "surrogates"]
)
def test_long_texts_fit_into_metadata(text: str) -> None:
    error = InvalidInputError(text, argument=text, reason=text, request_id=text)
    code, message, ((_, data),) = to_status(error)
    assert len(message.encode()) <= 1024
    assert len(data) < 8 * 1024
    assert type(from_status(code, message, ((DETAILS_KEY, data),))) is InvalidInputError


@pytest.mark.parametrize(
    ("code", "kind", "reason", "retryable"),
    [
        (CODE.INVALID_ARGUMENT, InvalidInputError, Reason.BAD_SHAPE, False),
        (CODE.UNIMPLEMENTED, InvalidInputError, Reason.UNKNOWN_NAME, False),
        (CODE.RESOURCE_EXHAUSTED, OverloadedError, Reason.OVERLOADED, True),
        (CODE.UNAVAILABLE, UnavailableError, Reason.NO_REPLICA, True),
        (CODE.CANCELLED, UnavailableError, Reason.NO_REPLICA, True),
        (CODE.ABORTED, UnavailableError, Reason.NO_REPLICA, True),
        (CODE.DATA_LOSS, UnavailableError, Reason.CHECKSUM, True),
        (CODE.DEADLINE_EXCEEDED, DeadlineError, Reason.EXPIRED, False),
        (CODE.UNAUTHENTICATED, AccessError, Reason.NO_CREDENTIAL, False),
        (CODE.PERMISSION_DENIED, AccessError, Reason.FORBIDDEN, False),
        (CODE.UNKNOWN, InternalError, Reason.BUG, False),
        (CODE.OUT_OF_RANGE, InternalError, Reason.BUG, False),
        (None, InternalError, Reason.BUG, False),
    ],
)
@pytest.mark.parametrize("trailing", [None, (), (("other", "x"),), ((DETAILS_KEY, b"\xff\xff"),), ((DETAILS_KEY, "text"),)])
def test_a_bare_status_is_understood_by_its_code(
    code: Any, kind: type[GraphKVError], reason: str, retryable: bool, trailing: Any
) -> None:
    got = from_status(code, "Socket closed", trailing, request_id="mine")
    assert fields(got) == {
        "class": kind, "message": "Socket closed", "reason": reason, "retryable": retryable, "argument": None,
        "retry_after": None, "request_id": "mine",
    }  # fmt: skip


def test_every_code_gives_some_error_with_some_text() -> None:
    for code in (*CODE, None):
        assert str(from_status(code, None))
        assert str(from_status(code, ""))


def test_details_of_others_are_not_ours() -> None:
    status = status_pb2.Status(code=8)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="QUOTA", domain="googleapis.com"))
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2)))
    status.details.add().Pack(Duration(seconds=5))
    got = from_status(CODE.RESOURCE_EXHAUSTED, "quota", ((DETAILS_KEY, status.SerializeToString()),))
    assert (type(got), got.reason, got.retry_after, got.argument) == (OverloadedError, Reason.OVERLOADED, 2.0, None)


def test_the_servers_request_id_wins_over_the_callers() -> None:
    code, message, trailing = to_status(InternalError("so", request_id="theirs"))
    assert from_status(code, message, trailing, request_id="mine").request_id == "theirs"
    code, message, trailing = to_status(InternalError("so"))
    assert from_status(code, message, trailing, request_id="mine").request_id == "mine"


def test_metadata_of_grpc_aio_is_read() -> None:
    error = OverloadedError("full", retry_after=0.5)
    assert fields(crossed(error, through=lambda trailing: grpc.aio.Metadata(*trailing))) == fields(error)
