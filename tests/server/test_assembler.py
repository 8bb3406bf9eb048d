"""The assembler without a socket: whole layers arrive byte for byte, whatever the split, and nothing wrong gets through.

Buffers are poisoned before every loan: a byte that was read without being written would show.
"""

from typing import Any

import numpy as np
import pytest
from graphkv_proto import v1 as pb
from graphkv_server import assembler
from graphkv_server.arriving import ArrivingLayer
from graphkv_server.engine.work import Scored
from graphkv_testing.assembling import BOUND, AssemblerCall, finish
from graphkv_testing.forms import POLICIES, call_of
from graphkv_testing.raw import RawCall, raw_policy

from graphkv import Graph, Policy
from graphkv.algorithm import Part
from graphkv.candidates import Candidates
from graphkv.layer import Layer
from graphkv.terms.errors import GraphKVError, InvalidInputError


def send(sent: RawCall, all_messages: list[Any] | None = None) -> AssemblerCall:
    """The call after all its messages; where one is refused, everything has come back."""
    call = AssemblerCall(sent.header)
    try:
        for message in sent.messages() if all_messages is None else all_messages:
            message.ClearField("header")
            call.take(message)
        call.assembler.closed()
    except GraphKVError:
        call.close()
        raise
    return call


def refused(sent: RawCall, all_messages: list[Any] | None = None) -> GraphKVError:
    with pytest.raises(GraphKVError) as caught:
        send(sent, all_messages)
    return caught.value


@pytest.mark.parametrize("chunk", [1, 13, 4096])
def test_layers_arrive_byte_for_byte(chunk: int) -> None:
    sent = RawCall(layers=3, kv_heads=3, query_heads=3, tokens=17, head_dim=5)
    call = send(sent, sent.messages(chunk=chunk))
    for layer in range(3):
        work = call.sink.layers[0, layer]
        assert isinstance(work, Layer)
        np.testing.assert_array_equal(work.keys.numpy(), sent.keys[layer])
        assert work.queries is not None
        np.testing.assert_array_equal(work.queries.numpy(), sent.queries[layer])
    assert call.sink.finished
    call.close()


def test_a_layer_leaves_as_soon_as_it_is_whole() -> None:
    sent = RawCall(layers=2)
    call = AssemblerCall(sent.header)
    seen = []
    for message in sent.messages():
        message.ClearField("header")
        call.take(message)
        seen.append(len(call.sink.layers))
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2]
    call.close()


def test_nothing_is_needed_of_a_prompt_that_is_kept_whole() -> None:
    sent = RawCall(tokens=7, tensors=[])
    sent.tensors.clear()
    sent.header.largest_layer_bytes = sent.header.total_bytes = 0
    call = send(sent)
    work = call.sink.layers[0, 1]
    assert isinstance(work, Candidates)
    assert work.plan.keeps_all
    work.check()
    call.close()


def narrowed() -> RawCall:
    """Two layers of 23 tokens as 14 candidates of 19 contenders each (budget 7, window 4, half as many again)."""
    sent = RawCall()
    sent.header.policy.graph.candidates = 2.0
    sent.header.query_heads = 0
    sent.tensors.clear()
    for layer in range(2):
        ids = np.tile(np.arange(14, dtype=np.int32), (2, 1))
        scores = np.linspace(1, 2, 28, dtype=np.float32).reshape(2, 14)
        facts = np.array([[30.0, 0.5, 19], [31.0, 0.5, 19]])
        for role, array in (
            (pb.ROLE_CANDIDATE_IDS, ids),
            (pb.ROLE_SCORES, scores),
            (pb.ROLE_ROW_FACTS, facts),
            (pb.ROLE_KEYS, np.ascontiguousarray(sent.keys[layer][:, :14])),
        ):
            sent.tensors.append((layer, role, array, 0))
    return sent


def test_the_narrowed_form() -> None:
    sent = narrowed()
    call = send(sent, sent.messages(chunk=31))
    work = call.sink.layers[0, 1]
    assert isinstance(work, Candidates)
    work.check()
    assert work.keys is not None
    np.testing.assert_array_equal(work.keys.numpy(), sent.keys[1][:, :14])
    assert work.facts.tolist() == [[30.0, 0.5, 19], [31.0, 0.5, 19]]
    call.close()


def test_forms_do_not_mix() -> None:
    sent = narrowed()
    sent.tensors.insert(1, (0, pb.ROLE_QUERIES, sent.queries[0], 0))
    assert refused(sent).reason == "BAD_LAYOUT"


@pytest.mark.parametrize("missing", [0, 1, 2, 3], ids=["ids", "scores", "facts", "keys"])
def test_a_narrowed_layer_needs_all_of_it(missing: int) -> None:
    sent = narrowed()
    del sent.tensors[missing]
    error = refused(sent)
    assert (error.reason, error.argument) == ("INCOMPLETE", "end")
    assert "layer 0 did not come" in str(error)


def test_errors_name_layer_role_expected_and_got() -> None:
    sent = RawCall()
    all_messages = sent.messages()
    all_messages[2].chunks[0].offset = 5
    assert (
        str(refused(sent, all_messages)) == "chunk.offset for keys of layer 0 is 5; it must be 0, as many bytes as came before"
    )


def test_callers_scores_exclude_queries() -> None:
    sent = RawCall()
    sent.header.importance = pb.IMPORTANCE_CALLER
    assert refused(sent).argument == "descriptor.role"


def test_more_than_the_header_declared_is_refused() -> None:
    sent = RawCall()
    sent.header.largest_layer_bytes -= 1
    sent.header.total_bytes -= 2
    error = refused(sent)
    assert (error.reason, error.argument) == ("BAD_LAYOUT", "descriptor.byte_length")
    sent = RawCall()
    sent.header.total_bytes -= 1
    assert refused(sent).argument == "descriptor.byte_length"


@pytest.mark.parametrize("tokens", [2**31, 2**40, 0, -1])
def test_prompts_have_a_possible_length(tokens: int) -> None:
    sent = RawCall()
    sent.header.prompts[0].tokens = tokens
    assert isinstance(refused(sent), InvalidInputError)


def test_a_prompt_too_long_to_answer_is_refused_at_the_header() -> None:
    """All of 2^30 tokens kept, and nothing to send for it: the answer alone would take 8 GiB."""
    sent = RawCall()
    sent.header.prompts[0].tokens = 2**30
    sent.header.policy.CopyFrom(raw_policy(budget=2**30))
    error = refused(sent)
    assert (error.reason, error.argument) == ("TOO_LARGE", "prompts[0].tokens")


def test_where_room_is_scarce_a_call_waits_for_it_before_it_reads_on() -> None:
    """One layer's room in all: the second message of the second layer is not even asked for until the first has gone."""
    sent = RawCall(layers=2)
    sent.header.largest_layer_bytes = sent.header.total_bytes = BOUND
    call = AssemblerCall(sent.header)
    all_messages = sent.messages()
    for message in all_messages[1:4]:
        call.take(message)
    assert len(call.sink.layers) == 1
    with pytest.raises(RuntimeError, match="no running event loop"):  # what waiting looks like without one
        call.assembler.ready().send(None)
    call.sink.leases.pop().give_back()
    finish(call.assembler.ready())
    for message in all_messages[4:]:
        call.take(message)
    call.assembler.closed()
    assert call.sink.finished
    call.close()


def test_where_there_is_room_none_is_taken_ahead() -> None:
    call = AssemblerCall(RawCall().header)
    finish(call.assembler.ready())
    assert call.admission.bytes_in_flight == 0
    call.close()


@pytest.mark.parametrize(("layers", "ranges"), [(2**14, 65), (265, 3972)], ids=["many layers", "many ranges"])
def test_pinned_ranges_are_limited_before_anything_is_planned(
    layers: int, ranges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = RawCall(tokens=8000)
    sent.header.layers = layers
    sent.header.prompts[0].pinned.extend(pb.TokenRange(start=2 * place, stop=2 * place + 1) for place in range(ranges))
    monkeypatch.setattr(assembler, "plan_layers", None)
    error = refused(sent)
    assert (error.reason, error.argument) == ("TOO_LARGE", "prompts[0].pinned")


def test_room_is_taken_for_an_answer_that_is_larger_than_what_came() -> None:
    """All 1000 tokens of two heads are kept and nothing has to come: their indices take room, twice."""
    sent = RawCall(tokens=1000)
    sent.header.policy.CopyFrom(raw_policy(budget=1000))
    sent.header.largest_layer_bytes = sent.header.total_bytes = 0
    sent.tensors.clear()
    call = send(sent)
    assert call.admission.bytes_in_flight == 2 * (2 * 1000 * 8)
    call.close()


def tiny(layers: int) -> tuple[RawCall, list[pb.Descriptor]]:
    """Layers of two tokens of one head of one f32, and a descriptor of each."""
    sent = RawCall(layers=1, kv_heads=1, query_heads=1, tokens=2, head_dim=1, window=1)
    sent.header.policy.CopyFrom(raw_policy(budget=1, window=1))
    sent.header.policy.scorer = pb.SCORER_KNORM
    sent.header.policy.ClearField("graph")
    sent.header.query_heads = 0
    sent.header.layers = layers
    sent.header.largest_layer_bytes, sent.header.total_bytes = 8, 8 * layers
    keys = pb.Descriptor(role=pb.ROLE_KEYS, dtype=pb.DTYPE_F32, dims=[1, 2, 1], layout=pb.LAYOUT_HND, count=2, byte_length=8)
    described = [pb.Descriptor.FromString(keys.SerializeToString()) for _ in range(layers)]
    for number, descriptor in enumerate(described):
        descriptor.id = descriptor.layer = number
    return sent, described


def test_a_message_costs_what_it_touches_however_many_layers_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, described = tiny(40)
    call = AssemblerCall(sent.header)
    call.take(pb.SelectRequest(descriptors=described))
    looked: list[int] = []
    whole = ArrivingLayer.whole

    def counted(layer: ArrivingLayer) -> bool:
        looked.append(layer.plan.layer)
        return whole(layer)

    monkeypatch.setattr(ArrivingLayer, "whole", counted)
    for layer, data in ((7, b"\0"), (9, bytes(8)), (7, bytes(7))):
        offset = 1 if len(data) == 7 else 0
        call.take(pb.SelectRequest(chunks=[pb.Chunk(descriptor=layer, offset=offset, data=data)]))
    assert looked == [7, 9, 7]
    assert list(call.sink.layers) == [(0, 9), (0, 7)]
    with pytest.raises(InvalidInputError, match="not complete yet"):
        call.take(pb.SelectRequest(chunks=[pb.Chunk(descriptor=9, offset=8, data=b"\0")]))
    call.close()


def test_layers_open_at_once_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembler, "MAX_OPEN_LAYERS", 3)
    sent, described = tiny(5)
    call = AssemblerCall(sent.header)
    call.take(pb.SelectRequest(descriptors=described[:3]))
    call.take(pb.SelectRequest(chunks=[pb.Chunk(descriptor=1, data=bytes(8))]))
    call.take(pb.SelectRequest(descriptors=described[3:4]))
    with pytest.raises(InvalidInputError, match="at most 3") as caught:
        call.take(pb.SelectRequest(descriptors=described[4:]))
    assert (caught.value.reason, caught.value.argument) == ("TOO_LARGE", "descriptor.layer")
    call.close()


def test_the_narrowed_form_with_the_scores_of_all_tokens() -> None:
    sent = call_of(POLICIES["a layer"], "narrowed", window=2)
    sent.tensors = sent.tensors[1::-1] + sent.tensors[2:]  # of one layer the scores come first: they are of either form
    call = send(sent, sent.messages(chunk=31))
    for layer in range(2):
        work = call.sink.layers[0, layer]
        assert isinstance(work, Scored)
        ids, scores, keys = (array for own, _, array, _ in sent.tensors if own == layer)
        if layer == 0:
            ids, scores = scores, ids
        assert work.keys is not None
        for tensor, array in ((work.ids, ids), (work.all_scores, scores), (work.keys, keys)):
            np.testing.assert_array_equal(tensor.numpy(), array)
        work.candidates().check()
    assert call.sink.together == {1}
    call.close()


@pytest.mark.parametrize("name", ["cake", "a model"])
def test_room_for_all_layers_is_taken_before_the_first_comes(name: str) -> None:
    sent = call_of(POLICIES[name], layers=3, window=2)
    call = AssemblerCall(sent.header)
    assert call.admission.bytes_in_flight == 0
    all_messages = sent.messages()
    for message in all_messages[1:3]:
        call.take(message)
        assert call.admission.bytes_in_flight == 3 * sent.header.largest_layer_bytes
    for message in all_messages[3:]:
        call.take(message)
    assert call.admission.bytes_in_flight == 3 * sent.header.largest_layer_bytes
    assert call.sink.together == {3}
    assert call.sink.layers[0, 0].plan.allocated == (name == "a model")
    call.close()


def test_parts_may_need_more_room_than_what_comes() -> None:
    """A few candidates of a long prompt, whose part is a vector of all its tokens."""
    policy = Policy(7, window=2, granularity="model", graph=Graph(update="sequential", strength=0.5))
    sent = call_of(policy, "narrowed", tokens=1000, window=2)
    assert sent.header.largest_layer_bytes < 1000 * 4
    call = send(sent)
    assert call.admission.bytes_in_flight >= 2 * Part.bytes_for(1000)
    call.close()


def test_who_needs_all_layers_waits_for_room_for_all_of_them() -> None:
    sent = call_of(POLICIES["cake"], window=2)
    sent.header.largest_layer_bytes, sent.header.total_bytes = BOUND // 2, BOUND
    call = AssemblerCall(sent.header)
    with call.admission.admit() as other:
        with pytest.raises(StopIteration):
            other.lease(1).send(None)
        with pytest.raises(RuntimeError, match="no running event loop"):  # what waiting looks like without one
            call.assembler.ready().send(None)
    finish(call.assembler.ready())
    assert call.admission.bytes_in_flight == 0  # there is room: none is taken ahead
    call.close()


def test_all_layers_are_more_than_fits() -> None:
    sent = call_of(POLICIES["cake"], layers=3, window=2)
    sent.header.largest_layer_bytes, sent.header.total_bytes = BOUND // 2, BOUND
    error = refused(sent)
    assert (error.reason, error.argument) == ("TOO_LARGE", "total_bytes")
    sent.header.policy.budget_allocation = pb.BUDGET_ALLOCATION_UNIFORM  # one at a time they do
    AssemblerCall(sent.header).close()
