"""Headers: round trips, and every way in which one can be wrong before a tensor arrives."""

from collections.abc import Callable

import pytest
from google.protobuf.descriptor import FieldDescriptor
from graphkv_proto import messages
from graphkv_proto import v1 as pb
from graphkv_proto.messages import Header, Prompt
from graphkv_testing.wire import headers
from hypothesis import given
from hypothesis import strategies as st

from graphkv.terms.errors import InvalidInputError, Reason
from graphkv.terms.policy import Policy

UNKNOWN_FIELD = b"\xc0\xb8\x02\x07"  # field 5000, a varint
HEADER = Header(
    policy=Policy(5),
    layers=3,
    kv_heads=2,
    head_dim=8,
    query_heads=6,
    largest_layer_bytes=100,
    total_bytes=300,
    prompts=(Prompt(17), Prompt(9, ((0, 2), (5, 9)))),
    request_id="a-1",
)


def sent(header: Header = HEADER) -> pb.Header:
    return pb.Header.FromString(messages.write_header(header).SerializeToString())


@given(headers())
def test_any_header_crosses_unchanged(header: Header) -> None:
    assert messages.read_header(sent(header)) == header


def test_a_field_of_a_later_version_is_ignored() -> None:
    assert pb.Header.FromString(UNKNOWN_FIELD).ByteSize() == len(UNKNOWN_FIELD)
    message = pb.Header.FromString(messages.write_header(HEADER).SerializeToString() + UNKNOWN_FIELD)
    message.policy.MergeFromString(UNKNOWN_FIELD)
    assert messages.read_header(message) == HEADER


def test_a_feature_that_is_required_and_not_known_is_refused() -> None:
    message = sent()
    message.required_features.append("mind_reading")
    with pytest.raises(InvalidInputError, match="all_scores, candidates, outputs, pages, token_ranges") as caught:
        messages.read_header(message)
    assert (caught.value.argument, caught.value.reason) == ("required_features", Reason.UNKNOWN_NAME)
    assert messages.read_header(message, features=("mind_reading",)).required_features == ("mind_reading",)


@pytest.mark.parametrize("given", ["", "bad id\n\x1b[31m", "x" * 65, "é"], ids=["none", "control", "long", "not ascii"])
def test_a_request_id_that_is_none_reads_as_none(given: str) -> None:
    message = sent()
    message.request_id = given
    assert messages.read_header(message).request_id == ""


def test_a_request_id_that_is_none_cannot_be_written() -> None:
    header = Header(**{name: getattr(HEADER, name) for name in Header.__dataclass_fields__} | {"request_id": "a b"})
    with pytest.raises(InvalidInputError) as caught:
        messages.write_header(header)
    assert caught.value.argument == "request_id"


def test_a_caller_without_the_fingerprint_is_served() -> None:
    message = sent()
    message.fingerprint = ""
    assert messages.read_header(message) == HEADER


def test_outputs_are_read_once_each_in_one_order() -> None:
    message = sent()
    message.outputs.extend([pb.OUTPUT_MOVES, pb.OUTPUT_KEEP_MASK, pb.OUTPUT_MOVES])
    assert messages.read_header(message).outputs == ("keep_mask", "moves")


def setting(**fields: object) -> Callable[[pb.Header], None]:
    return lambda message: message.MergeFrom(pb.Header(**fields))  # type: ignore[arg-type]


def cleared(field: str) -> Callable[[pb.Header], None]:
    return lambda message: message.ClearField(field)


def pinned(start: int, stop: int) -> Callable[[pb.Header], None]:
    return lambda message: message.prompts[1].pinned.add(start=start, stop=stop) and None


def prompts(*, tokens: int, number: int = 1, ranges: int = 0) -> Callable[[pb.Header], None]:
    def bend(message: pb.Header) -> None:
        one = pb.Prompt(tokens=tokens, pinned=[pb.TokenRange(start=0, stop=1)] * ranges)
        del message.prompts[:]
        message.prompts.extend([one] * number)

    return bend


def layer_factors(message: pb.Header) -> None:
    message.policy.granularity = pb.GRANULARITY_LAYER
    message.fingerprint = ""
    message.outputs.append(pb.OUTPUT_DECAY_FACTORS)


S, P, L, U = Reason.BAD_SHAPE, Reason.BAD_POLICY, Reason.TOO_LARGE, Reason.UNKNOWN_NAME
BAD: dict[str, tuple[Callable[[pb.Header], None], str, Reason]] = {
    "no policy": (cleared("policy"), "policy", P),
    "a policy of nothing": (lambda m: m.policy.Clear(), "policy.budget", P),
    "another policy's fingerprint": (setting(fingerprint="0" * 16), "fingerprint", Reason.FINGERPRINT),
    "a long fingerprint": (setting(fingerprint="0" * 10_000), "fingerprint", Reason.FINGERPRINT),
    "no encoding": (cleared("encoding"), "encoding", P),
    "int8, later": (setting(encoding=pb.ENCODING_INT8), "encoding", U),
    "encoding 999": (setting(encoding=999), "encoding", U),
    "no importance": (cleared("importance"), "importance", P),
    "importance 999": (setting(importance=999), "importance", U),
    "no layers": (cleared("layers"), "layers", S),
    "layers -1": (setting(layers=-1), "layers", S),
    "no KV heads": (cleared("kv_heads"), "kv_heads", S),
    "KV heads -2": (setting(kv_heads=-2), "kv_heads", S),
    "no head_dim": (cleared("head_dim"), "head_dim", S),
    "query heads no multiple": (setting(query_heads=7), "query_heads", S),
    "query heads -2": (setting(query_heads=-2), "query_heads", S),
    "a layer of -1 bytes": (setting(largest_layer_bytes=-1), "largest_layer_bytes", S),
    "least int64 bytes": (setting(total_bytes=-(2**63)), "total_bytes", S),
    "no prompts": (cleared("prompts"), "prompts", S),
    "too many prompts": (prompts(tokens=1, number=4097), "prompts", L),
    "a prompt of no tokens": (prompts(tokens=0), "prompts[0].tokens", S),
    "a prompt of -1 tokens": (prompts(tokens=-1, number=3), "prompts[0].tokens", S),
    "a prompt beyond int32": (prompts(tokens=2**31), "prompts[0].tokens", L),
    "a prompt of 2^62 tokens": (prompts(tokens=2**62), "prompts[0].tokens", L),
    "too many pinned ranges": (prompts(tokens=9, number=3, ranges=1366), "prompts[2].pinned", L),
    "pinned beyond n": (pinned(3, 10), "prompts[1].pinned[2]", S),
    "pinned from -1": (pinned(-1, 3), "prompts[1].pinned[2]", S),
    "pinned nothing": (pinned(3, 3), "prompts[1].pinned[2]", S),
    "pinned backwards": (pinned(4, 3), "prompts[1].pinned[2]", S),
    "a rope of nothing": (lambda m: m.rope.SetInParent(), "rope.rotary_dim", P),
    "output 999": (setting(outputs=[999]), "outputs[0]", U),
    "output 0": (setting(outputs=[0]), "outputs[0]", P),
    "an output after a good one": (setting(outputs=[pb.OUTPUT_MOVES, 7]), "outputs[1]", U),
    "more outputs than there are": (setting(outputs=[pb.OUTPUT_MOVES] * 7), "outputs", L),
    "an order of choice where nobody chooses": (setting(outputs=[pb.OUTPUT_CHOICE_ORDER]), "outputs", S),
    "the factors of heads that share": (layer_factors, "outputs", S),
    "a shard, later": (setting(shard=pb.Shard(group="g" * 1000, world=2)), "shard", U),
    "a region, later": (setting(region_id=b"\0" * 16), "region_id", U),
    "an unknown feature": (setting(required_features=["x" * 5000]), "required_features", U),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_refused_with_its_path(name: str) -> None:
    bend, argument, reason = BAD[name]
    message = sent()
    bend(message)
    with pytest.raises(InvalidInputError) as caught:
        messages.read_header(pb.Header.FromString(message.SerializeToString()))
    assert (caught.value.argument, caught.value.reason) == (argument, reason)
    assert len(str(caught.value)) < 400


EDGES = [0, 1, 2, -1, 7, 999, 2**31 - 1, -(2**31)]
NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32: st.sampled_from(EDGES),
    FieldDescriptor.CPPTYPE_ENUM: st.sampled_from(EDGES),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.sampled_from([*EDGES, 2**31, 2**62, 2**63 - 1, -(2**63)]),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
}


@given(st.data())
def test_whatever_a_peer_sends_is_read_or_refused(data: st.DataObject) -> None:
    message = sent()
    holders = [message, message.policy, message.policy.graph, message.prompts[0]]
    for holder in data.draw(st.lists(st.sampled_from(holders), min_size=1, max_size=3)):
        field = data.draw(st.sampled_from(list(holder.DESCRIPTOR.fields)))
        if isinstance(getattr(holder, field.name), int | float) and data.draw(st.booleans()):
            setattr(holder, field.name, data.draw(NUMBERS[field.cpp_type]))
        else:
            holder.ClearField(field.name)
    try:
        header = messages.read_header(message)
    except InvalidInputError:
        return
    assert messages.read_header(sent(header)) == header
