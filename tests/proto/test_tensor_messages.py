"""Descriptors, chunks and ends: round trips, and descriptors that lie about themselves."""

from collections.abc import Callable

import numpy as np
import pytest
from graphkv_proto import messages
from graphkv_proto import v1 as pb
from graphkv_proto.messages import Descriptor, End
from graphkv_testing.wire import MOST, descriptors, ends
from hypothesis import given
from hypothesis import strategies as st

from graphkv.terms.errors import InvalidInputError, Reason

KEYS = Descriptor(3, 0, 5, "keys", "bf16", (2, 17, 8), start=4, count=17, byte_length=2 * 17 * 8 * 2)


def sent(descriptor: Descriptor = KEYS) -> pb.Descriptor:
    return pb.Descriptor.FromString(messages.write_descriptor(descriptor).SerializeToString())


@given(descriptors())
def test_any_descriptor_crosses_unchanged(descriptor: Descriptor) -> None:
    assert messages.read_descriptor(sent(descriptor)) == descriptor


@given(ends)
def test_any_end_crosses_unchanged(end: End) -> None:
    assert messages.read_end(pb.End.FromString(messages.write_end(end).SerializeToString())) == end


@pytest.mark.parametrize("field", ["descriptors", "bytes"])
def test_an_end_counts_no_less_than_nothing(field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        messages.read_end(pb.End(**{field: -1}))
    assert caught.value.argument == f"end.{field}"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_a_chunk_takes_any_buffer(kind: Callable[[bytes], object]) -> None:
    chunk = messages.write_chunk(7, 5, kind(b"12345"))
    assert (chunk.descriptor, chunk.offset, chunk.data) == (7, 5, b"12345")


def test_a_small_call_is_one_message() -> None:
    message = messages.write_request(
        descriptors=[KEYS], chunks=[messages.write_chunk(3, 0, b"\0" * KEYS.byte_length)], end=End(1, KEYS.byte_length, 9)
    )
    assert not message.HasField("header")
    assert messages.read_descriptor(message.descriptors[0]) == KEYS
    assert messages.read_end(message.end) == End(1, KEYS.byte_length, 9)


def with_dims(*dims: int, role: int = pb.ROLE_KEYS) -> Callable[[pb.Descriptor], None]:
    def bend(message: pb.Descriptor) -> None:
        message.role = role  # type: ignore[assignment]
        message.dims[:] = dims

    return bend


def setting(**fields: object) -> Callable[[pb.Descriptor], None]:
    def bend(message: pb.Descriptor) -> None:
        for name, value in fields.items():
            setattr(message, name, value)

    return bend


S, L, U = Reason.BAD_SHAPE, Reason.TOO_LARGE, Reason.UNKNOWN_NAME
BAD: dict[str, tuple[Callable[[pb.Descriptor], None], str, Reason]] = {
    "role 0": (setting(role=0), "descriptor.role", S),
    "role 999": (setting(role=999), "descriptor.role", U),
    "dtype 0": (setting(dtype=0), "descriptor.dtype", S),
    "dtype 999": (setting(dtype=999), "descriptor.dtype", U),
    "layout 0": (setting(layout=0), "descriptor.layout", S),
    "layout 999": (setting(layout=999), "descriptor.layout", U),
    "in a region": (lambda m: m.region.SetInParent(), "descriptor.place", U),
    "on a device": (lambda m: m.device.SetInParent(), "descriptor.place", U),
    "id -1": (setting(id=-1), "descriptor.id", S),
    "prompt -1": (setting(prompt=-1), "descriptor.prompt", S),
    "layer -1": (setting(layer=-(2**63)), "descriptor.layer", S),
    "start -1": (setting(start=-1), "descriptor.start", S),
    "count -1": (setting(count=-1), "descriptor.count", S),
    "-1 bytes": (setting(byte_length=-1), "descriptor.byte_length", S),
    "no dims": (with_dims(), "keys", S),
    "rank 2": (with_dims(2, 17), "keys", S),
    "rank 400": (with_dims(*[1] * 400), "keys", S),
    "scores of rank 3": (with_dims(2, 17, 1, role=pb.ROLE_SCORES), "scores", S),
    "dim 0": (with_dims(2, 0, 8), "keys", S),
    "dim -17": (with_dims(2, -17, -8), "keys", S),
    "dim 2^31": (with_dims(2**31, 1, 1), "keys", S),
    "dim 2^63 - 1": (with_dims(MOST, MOST, MOST), "keys", S),
    "product 2^64 + small": (with_dims(2**31 - 1, 2**31 - 1, 9), "descriptor.byte_length", S),
    "a byte short": (setting(byte_length=KEYS.byte_length - 1), "descriptor.byte_length", S),
    "a byte more": (setting(byte_length=KEYS.byte_length + 1), "descriptor.byte_length", S),
    "half precision said to be single": (setting(dtype=pb.DTYPE_F32), "descriptor.byte_length", S),
    "2^62 bytes": (setting(byte_length=2**62), "descriptor.byte_length", L),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_descriptor_that_lies_is_refused(name: str) -> None:
    bend, argument, reason = BAD[name]
    message = sent()
    bend(message)
    with pytest.raises(InvalidInputError) as caught:
        messages.read_descriptor(pb.Descriptor.FromString(message.SerializeToString()))
    assert (caught.value.argument, caught.value.reason) == (argument, reason)
    assert len(str(caught.value)) < 300


def test_a_product_that_wraps_in_int64_is_not_taken_for_a_small_one() -> None:
    message = sent()
    message.dims[:] = [2**21, 2**21, 2**21 + 1]
    message.byte_length = 2**43  # the product in bytes is 2^64 + 2^43
    with pytest.raises(InvalidInputError, match=str(2**64 + 2**43)):
        messages.read_descriptor(message)


@given(st.data())
def test_whatever_a_peer_sends_is_read_or_refused(data: st.DataObject) -> None:
    message = sent()
    integers = st.integers(-(2**63), MOST) | st.integers(-2, 20)
    for field in data.draw(st.lists(st.sampled_from([f for f in message.DESCRIPTOR.fields if not f.message_type]), max_size=3)):
        if field.name == "dims":
            message.dims[:] = data.draw(st.lists(integers, max_size=4))
        elif field.enum_type:
            setattr(message, field.name, data.draw(st.integers(-5, 1000)))
        else:
            setattr(message, field.name, data.draw(integers))
    try:
        descriptor = messages.read_descriptor(message)
    except InvalidInputError:
        return
    assert sent(descriptor) == message
