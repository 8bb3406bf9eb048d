"""One call as data: its messages in order and its answers folded, without a socket."""

import math
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from graphkv_client import Graph, InternalError, InvalidInputError, Policy, Rope
from graphkv_client._call import Selecting, selecting
from graphkv_client._inputs import CallTerms
from graphkv_proto import messages
from graphkv_testing.stand_in import answer, end_of

POLICY = Policy(9, window=4)


def plan(policy: Policy = POLICY, *, layers: int = 2, tokens: int = 21, dim: int = 8, **given: Any) -> Selecting:
    rng = np.random.default_rng(tokens)
    roles: dict[str, Any] = {
        "keys": rng.standard_normal((layers, 2, tokens, dim), dtype=np.float32),
        "queries": rng.standard_normal((layers, 4, min(4, tokens), dim), dtype=np.float32),
        **dict.fromkeys(("attention", "scores", "similarity_keys", "positions")),
        **given,
    }
    rope = roles.pop("rope", None)
    pinned = roles.pop("pinned", None)
    return selecting(roles, terms=CallTerms(policy, rope), pinned=pinned, encoding="auto")


def tensors(**given: Any) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {role: torch.from_numpy(rng.standard_normal(dims, dtype=np.float32)) for role, dims in given.items()}


def test_a_small_call_is_one_message() -> None:
    own = plan()
    (message,) = own.requests()
    header = messages.read_header(message.header)
    assert header.request_id == own.call.request_id
    assert (header.layers, header.query_heads, header.kv_heads, header.head_dim) == (2, 4, 2, 8)
    assert not header.caller_scores
    assert [prompt.tokens for prompt in header.prompts] == [21]
    payload = b"".join(chunk.data for chunk in message.chunks)
    assert len(payload) == header.total_bytes == own.call.sent_bytes == 2 * header.largest_layer_bytes
    assert (message.end.descriptors, message.end.bytes) == (4, len(payload))
    assert message.end.crc32c == google_crc32c.value(payload)


def test_a_large_call_is_cut_at_a_mebibyte_and_no_layer_begins_in_anothers_message() -> None:
    own = plan(tokens=5003, dim=32)
    sent = list(own.requests())
    assert all(sum(len(chunk.data) for chunk in message.chunks) <= 2**20 for message in sent)
    assert [message.HasField("header") for message in sent] == [True] + [False] * (len(sent) - 1)
    assert [message.HasField("end") for message in sent] == [False] * (len(sent) - 1) + [True]
    for message in sent:
        assert len({descriptor.layer for descriptor in message.descriptors}) <= 1
    described = [descriptor for message in sent for descriptor in message.descriptors]
    got = {descriptor.id: 0 for descriptor in described}
    for message in sent:
        for chunk in message.chunks:
            assert chunk.offset == got[chunk.descriptor]
            got[chunk.descriptor] += len(chunk.data)
    assert all(got[descriptor.id] == descriptor.byte_length for descriptor in described)
    assert own.call.sent_bytes == sum(got.values())


@pytest.mark.parametrize("policy", [POLICY, Policy(9, window=4, graph=None), Policy.sequential(9, window=4)])
@pytest.mark.parametrize("tokens", [5, 9, 10, 57])
def test_declared_sizes_hold_what_is_sent(policy: Policy, tokens: int) -> None:
    rope = Rope((1.0, 0.1), 4)
    positions = torch.arange(tokens).repeat(2, 1)
    for extra in ({}, {"positions": positions}):
        own = plan(
            policy,
            tokens=tokens,
            rope=rope,
            **tensors(keys=(2, 2, tokens, 8), queries=(2, 4, min(4, tokens), 8)),
            **extra,
        )
        sent = list(own.requests())
        header = messages.read_header(sent[0].header)
        assert own.call.sent_bytes <= header.total_bytes
        for layer in range(2):
            lengths = [one.byte_length for message in sent for one in message.descriptors if one.layer == layer]
            assert sum(lengths) <= header.largest_layer_bytes


def test_candidates_do_not_grow_with_the_prompt() -> None:
    sent = []
    for tokens in (500, 4000):
        own = plan(tokens=tokens, **tensors(keys=(2, 2, tokens, 8), queries=(2, 4, 4, 8)))
        list(own.requests())
        sent.append(own.call.sent_bytes)
    assert sent[0] == sent[1]
    assert own.call.summary(seconds={}).seconds["prescore"] > 0


def test_attention_of_a_tensor_never_travels() -> None:
    given = tensors(keys=(2, 2, 21, 8), attention=(2, 4, 4, 21))
    own = plan(Policy(9, window=4, graph=Graph(candidates=None)), queries=None, **given)
    (message,) = own.requests()
    roles = {messages.read_descriptor(one).role for one in message.descriptors}
    assert roles == {"keys", "scores"}
    assert not messages.read_header(message.header).caller_scores


def test_a_number_that_is_not_finite_is_found_before_it_travels() -> None:
    given = tensors(keys=(2, 2, 21, 8), queries=(2, 4, 4, 8))
    given["queries"][1, 0, 0, 0] = math.nan
    own = plan(**given)
    with pytest.raises(InvalidInputError) as raised:
        list(own.requests())
    assert (raised.value.argument, raised.value.reason) == ("queries", "NON_FINITE")


@pytest.mark.parametrize("encoding", ["int8", "", "EXACT"])
def test_an_unknown_encoding_names_the_known_ones(encoding: str) -> None:
    roles = dict.fromkeys(("queries", "attention", "scores", "similarity_keys", "positions"))
    with pytest.raises(InvalidInputError, match="one of auto, exact") as raised:
        selecting({"keys": np.ones((1, 1, 3, 2)), **roles}, terms=CallTerms(POLICY), pinned=None, encoding=encoding)
    assert (raised.value.argument, raised.value.reason) == ("encoding", "UNKNOWN_NAME")


def sent_header(own: Selecting) -> messages.Header:
    return messages.read_header(next(own.requests()).header)


def test_answers_come_in_any_order() -> None:
    own = plan()
    header = sent_header(own)
    (late,) = own.call.fold(answer(header, 1))
    assert late.layer == 1
    own.call.fold(answer(header, 0))
    own.call.fold(end_of(header))
    selection = own.result(seconds=1.5)
    assert not isinstance(selection, list)
    assert [layer.layer for layer in selection] == [0, 1]
    assert selection.indices[0].tolist() == [list(range(9))] * 2
    assert selection.summary.seconds == {"compute": 0.25, "total": 1.5}
    assert (selection.summary.where, selection.summary.transport) == ("stand-in", "tcp")
    assert selection.summary.request_id == own.call.request_id
    selection.check(num_tokens=21, policy=POLICY)


@pytest.mark.parametrize("folded", [[], [0], [0, 1]], ids=["nothing", "one layer", "no summary"])
def test_never_an_answer_in_part(folded: list[int]) -> None:
    own = plan()
    header = sent_header(own)
    for layer in folded:
        own.call.fold(answer(header, layer))
    with pytest.raises(InternalError, match="ended its answer without") as raised:
        own.result(seconds=0)
    assert raised.value.request_id == own.call.request_id


@pytest.mark.parametrize(
    "changes",
    [{"layer": 2}, {"prompt": 1}, {"num_tokens": 20}, {"fingerprint": "0" * 16}],
    ids=["another layer", "another prompt", "another length", "another policy"],
)
def test_the_fence(changes: dict[str, Any]) -> None:
    own = plan()
    header = sent_header(own)
    with pytest.raises(InternalError):
        own.call.fold(answer(header, **{"layer": 0, **changes}) if "prompt" not in changes else foreign(header))


def foreign(header: messages.Header) -> Any:
    response = answer(header, 0)
    response.layers[0].prompt = 1
    return response


def test_a_layer_is_answered_once() -> None:
    own = plan()
    header = sent_header(own)
    own.call.fold(answer(header, 0))
    with pytest.raises(InternalError, match="layer 0 of prompt 0"):
        own.call.fold(answer(header, 0))


def test_ragged_rows_are_a_list_in_kind() -> None:
    own = plan(**tensors(keys=(2, 2, 21, 8), queries=(2, 4, 4, 8)))
    header = sent_header(own)
    rows = [np.array([0, 3], np.int32), np.array([1], np.int32)]
    (layer,) = own.call.fold(answer(header, 0, indices=rows))
    assert [row.tolist() for row in layer.indices] == [[0, 3], [1]]
    assert all(isinstance(row, torch.Tensor) for row in layer.indices)
