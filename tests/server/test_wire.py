"""A real server process, spoken to in raw protobuf: right answers, and for every wrong request the status of DESIGN's table.

After every case no byte is in flight, no call is open, and a good caller's answer is the library's.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from graphkv_proto import v1 as pb
from graphkv_testing.process import Server, serve, wait_until
from graphkv_testing.raw import SELECT, RawCall, assert_good, call, collect, raw_policy

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--max-bytes-in-flight", "16MiB", "--stall-timeout", "5", "--device", "cpu") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        running: Server = request.getfixturevalue("server")
        assert running.settled(), running.metrics()


def test_the_ready_line_says_addresses_device_and_limits(server: Server) -> None:
    for part in (
        "ready: address=127.0.0.1:",
        "metrics=127.0.0.1:",
        "device=cpu",
        "max-bytes-in-flight=16MiB",
        "max-requests-in-flight=64",
    ):
        assert part in server.ready


@pytest.mark.parametrize("chunk", [2**20, 100, 7], ids="{} bytes a chunk".format)
def test_an_answer_is_the_librarys(server: Server, chunk: int) -> None:
    got = assert_good(server.address, RawCall(seed=1), chunk=chunk)
    assert got.summary.request_id == "raw"
    assert got.summary.received_bytes == 2 * (2 * 23 * 8 + 4 * 4 * 8) * 4
    assert got.summary.transport == pb.TRANSPORT_TCP
    assert {"receive", "queue", "compute"} <= set(got.summary.seconds)


def test_a_small_call_is_one_message(server: Server) -> None:
    sent = RawCall(seed=2)
    whole = pb.SelectRequest()
    for message in sent.messages():
        whole.MergeFrom(message)
    got = call(server.address, [whole])
    assert got.code == grpc.StatusCode.OK
    np.testing.assert_array_equal(got.indices(1), sent.expected()[1])


def test_a_layer_is_answered_while_later_ones_still_arrive(server: Server) -> None:
    sent = RawCall(layers=3, seed=3)
    go_on = threading.Event()

    def slowly() -> Iterator[Any]:
        for message in sent.messages():
            if message.descriptors and message.descriptors[0].layer == 1:
                assert go_on.wait(30)
            yield message

    with grpc.insecure_channel(server.address) as channel:
        method = channel.stream_stream(
            SELECT, request_serializer=pb.SelectRequest.SerializeToString, response_deserializer=pb.SelectResponse.FromString
        )
        responses = method(slowly(), timeout=30)
        first = next(responses)
        assert [answer.layer for answer in first.layers] == [0]
        go_on.set()
        assert len(list(responses)) == 3  # two layers and the summary


def header(**changes: Any) -> Callable[[RawCall], list[Any]]:
    """The call with fields of its header, or by a__b of a message in it, set otherwise."""

    def bent(sent: RawCall) -> list[Any]:
        for name, value in changes.items():
            *path, last = name.split("__")
            target = sent.header
            for step in path:
                target = getattr(target, step)
            if value is None:
                target.ClearField(last)
            else:
                setattr(target, last, value)
        return sent.messages()

    return bent


def nan_in_a_key(sent: RawCall) -> list[Any]:
    sent.keys[1, 1, 3, 5] = np.nan
    return sent.messages()


def wrong_shape(sent: RawCall) -> list[Any]:
    sent.tensors[0] = (0, pb.ROLE_KEYS, sent.keys[0][:, :, :7], 23)
    return sent.messages()


def wrong_window(sent: RawCall) -> list[Any]:
    sent.tensors[1] = (0, pb.ROLE_QUERIES, sent.queries[0][:, :3], 0)
    return sent.messages()


def missing_rope(sent: RawCall) -> list[Any]:
    sent.header.policy.CopyFrom(raw_policy(pre_rope=True))
    return sent.messages()


def chunk_past_the_size(sent: RawCall) -> list[Any]:
    messages = sent.messages()
    messages[2].chunks[0].data += b"\0"
    return messages


def chunk_out_of_order(sent: RawCall) -> list[Any]:
    messages = sent.messages(chunk=64)
    messages[2], messages[3] = messages[3], messages[2]
    return messages


def chunk_twice(sent: RawCall) -> list[Any]:
    messages = sent.messages(chunk=64)
    return [*messages[:3], messages[2], *messages[3:]]


def chunk_of_nothing(sent: RawCall) -> list[Any]:
    messages = sent.messages()
    messages[2].chunks[0].descriptor = 77
    return messages


def missing_chunk(sent: RawCall) -> list[Any]:
    messages = sent.messages()
    del messages[-2]
    return messages


def missing_layer(sent: RawCall) -> list[Any]:
    sent.tensors = [entry for entry in sent.tensors if entry[0] == 0]
    return sent.messages()


def wrong_checksum(sent: RawCall) -> list[Any]:
    messages = sent.messages()
    messages[-1].end.crc32c ^= 1
    return messages


def flipped_bit(sent: RawCall) -> list[Any]:
    messages = sent.messages()
    data = bytearray(messages[2].chunks[0].data)
    data[0] ^= 1
    messages[2].chunks[0].data = bytes(data)
    return messages


def half_closed_early(sent: RawCall) -> list[Any]:
    return sent.messages()[:-1]


def descriptor_of(size: int) -> Callable[[RawCall], list[Any]]:
    def bent(sent: RawCall) -> list[Any]:
        messages = sent.messages()
        messages[1].descriptors[0].byte_length = size
        return messages

    return bent


def huge_dims(sent: RawCall) -> list[Any]:
    messages = sent.messages()
    messages[1].descriptors[0].dims[:] = [2**31, 2**31, 2**62 + 1]
    return messages


def second_header(sent: RawCall) -> list[Any]:
    messages = sent.messages()
    messages[1].header.CopyFrom(sent.header)
    return messages


def after_the_end(sent: RawCall) -> list[Any]:
    messages = sent.messages()
    return [*messages, messages[1]]


def no_header(sent: RawCall) -> list[Any]:
    return sent.messages()[1:]


def overlapping_ranges(sent: RawCall) -> list[Any]:
    sent.tensors = [(0, pb.ROLE_KEYS, sent.keys[0][:, :12], 12), *sent.tensors]
    sent.header.largest_layer_bytes *= 2
    sent.header.total_bytes *= 2
    return sent.messages()


def too_many_pinned(sent: RawCall) -> list[Any]:
    sent.header.prompts[0].pinned.add(start=0, stop=20)
    return sent.messages()


CASES: dict[str, tuple[Callable[[RawCall], list[Any]], grpc.StatusCode, str, str]] = {
    "NaN in a key": (nan_in_a_key, INVALID, "NON_FINITE", "keys"),
    "wrong shape": (wrong_shape, INVALID, "BAD_SHAPE", "keys"),
    "wrong window": (wrong_window, INVALID, "BAD_SHAPE", "queries"),
    "Hq not a multiple of Hkv": (header(query_heads=3), INVALID, "BAD_SHAPE", "query_heads"),
    "budget 0": (header(policy__budget_tokens=0), INVALID, "BAD_POLICY", "budget"),
    "budget ratio NaN": (header(policy__budget_ratio=float("nan")), INVALID, "BAD_POLICY", "budget"),
    "scorer 0": (header(policy__scorer=0), INVALID, "BAD_POLICY", "scorer"),
    "unknown scorer": (header(policy__scorer=999), UNIMPLEMENTED, "UNKNOWN_NAME", "scorer"),
    "a budget of a later version": (header(policy__budget_allocation=999), UNIMPLEMENTED, "UNKNOWN_NAME", "budget_allocation"),
    "unknown encoding": (header(encoding=999), UNIMPLEMENTED, "UNKNOWN_NAME", "encoding"),
    "int8, not known yet": (header(encoding=pb.ENCODING_INT8), UNIMPLEMENTED, "UNKNOWN_NAME", "encoding"),
    "wrong fingerprint": (header(fingerprint="0" * 16), INVALID, "FINGERPRINT", "fingerprint"),
    "missing rope": (missing_rope, INVALID, "ROPE_MISSING", "rope"),
    "no layers": (header(layers=0), INVALID, "BAD_SHAPE", "layers"),
    "2^40 layers": (header(layers=2**40), INVALID, "TOO_LARGE", "layers"),
    "pinned beyond the budget": (too_many_pinned, INVALID, "BAD_POLICY", "pinned"),
    "chunk past the declared size": (chunk_past_the_size, INVALID, "BAD_LAYOUT", "chunk.data"),
    "chunk out of order": (chunk_out_of_order, INVALID, "BAD_LAYOUT", "chunk.offset"),
    "chunk twice": (chunk_twice, INVALID, "BAD_LAYOUT", "chunk.offset"),
    "chunk of nothing": (chunk_of_nothing, INVALID, "BAD_LAYOUT", "chunk.descriptor"),
    "missing chunk": (missing_chunk, INVALID, "INCOMPLETE", "end"),
    "missing layer": (missing_layer, INVALID, "INCOMPLETE", "end"),
    "wrong checksum": (wrong_checksum, grpc.StatusCode.DATA_LOSS, "CHECKSUM", "end.crc32c"),
    "a bit flipped": (flipped_bit, grpc.StatusCode.DATA_LOSS, "CHECKSUM", "end.crc32c"),
    "half-closed early": (half_closed_early, INVALID, "INCOMPLETE", "end"),
    "largest layer of 2^62 bytes": (header(largest_layer_bytes=2**62), INVALID, "TOO_LARGE", "largest_layer_bytes"),
    "largest layer above the bound": (header(largest_layer_bytes=2**24 + 1), INVALID, "TOO_LARGE", "largest_layer_bytes"),
    "2^62 bytes in all": (header(total_bytes=2**62), INVALID, "TOO_LARGE", "total_bytes"),
    "a tensor of 2^62 bytes": (descriptor_of(2**62), INVALID, "TOO_LARGE", "descriptor.byte_length"),
    "dims whose product overflows": (huge_dims, INVALID, "BAD_SHAPE", "keys"),
    "a second header": (second_header, INVALID, "BAD_LAYOUT", "header"),
    "no header": (no_header, INVALID, "INCOMPLETE", "header"),
    "nothing at all": (lambda sent: [], INVALID, "INCOMPLETE", "header"),
    "a message after the end": (after_the_end, INVALID, "BAD_LAYOUT", "end"),
    "overlapping ranges": (overlapping_ranges, INVALID, "BAD_LAYOUT", "descriptor.start"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_request_gets_its_status_reason_and_field(server: Server, name: str) -> None:
    bend, code, reason, field = CASES[name]
    before = server.outcomes().get(reason, 0)
    got = call(server.address, bend(RawCall(seed=5)))
    assert (got.code, got.reason) == (code, reason), got.message
    assert any(known == field or known.endswith("." + field) for known in got.fields or [got.info.get("argument", "")]), got
    assert server.settled()
    assert wait_until(lambda: server.outcomes().get(reason, 0) == before + 1)
    assert_good(server.address)


def test_bytes_that_are_no_message(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        method = channel.stream_stream(SELECT, response_deserializer=pb.SelectResponse.FromString)
        got = collect(method(iter([b"\xff" * 20]), timeout=30))
    assert (got.code, got.reason) == (INVALID, "BAD_LAYOUT")
    assert_good(server.address)


def test_an_end_without_a_half_close_is_enough(server: Server) -> None:
    never = threading.Event()

    def stays_open() -> Iterator[Any]:
        yield from RawCall(seed=8).messages()
        never.wait(30)

    got = call(server.address, stays_open())
    never.set()
    assert got.code == grpc.StatusCode.OK
    assert got.summary is not None


def test_the_request_id_is_answered_or_replaced(server: Server) -> None:
    sent = RawCall()
    sent.header.request_id = "bad id\n\x1b[31m"
    sent.header.policy.budget_tokens = 0
    got = call(server.address, sent.messages())
    assert got.info["request_id"]
    assert "bad id" not in str(got.info)
    assert not any("bad id" in line for line in server.lines)


def test_unknown_scorer_names_the_known_ones(server: Server) -> None:
    got = call(server.address, CASES["unknown scorer"][0](RawCall()))
    assert "snapkv" in got.message.lower()
    assert "knorm" in got.message.lower()


def test_a_non_finite_number_is_named_by_layer_head_and_token(server: Server) -> None:
    got = call(server.address, nan_in_a_key(RawCall()))
    assert "layer 1, KV head 1, token 3" in got.message
