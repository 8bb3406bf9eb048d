"""Calls whose answers are coarse, ragged or hold outputs: what they send, and which answers pass the fence. No socket."""

from typing import Any

import numpy as np
import pytest
import torch
from graphkv_client import AsyncCompressClient, CompressClient, Graph, InternalError, InvalidInputError, Policy, Rope
from graphkv_client._call import Selecting, selecting
from graphkv_client._inputs import ROLES, CallTerms
from graphkv_proto import messages
from graphkv_testing.stand_in import answer, end_of

LAYERS, HEADS, GROUP, TOKENS, WINDOW, DIM = 2, 3, 2, 61, 4, 8
CONTENDERS = TOKENS - WINDOW
ROPE = Rope((1.0, 0.1), 4)
DEFAULT = Graph(candidates=2.0)
ALL_COMPARED = Graph(candidates=None)
SEQUENTIAL = Graph(update="sequential", similarity="pre_rope", strength=0.1, candidates=2.0)


def policy(budget: int = 12, **fields: Any) -> Policy:
    return Policy(budget, **{"window": WINDOW, "graph": DEFAULT, **fields})


def given(kind: str = "torch", tokens: int = TOKENS, **roles: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(tokens)
    shapes = {
        "keys": (LAYERS, HEADS, tokens, DIM),
        "queries": (LAYERS, HEADS * GROUP, WINDOW, DIM),
        "attention": (LAYERS, HEADS * GROUP, WINDOW, tokens),
    }
    names = roles or {"keys": (), "queries": ()}
    arrays = {role: np.abs(rng.standard_normal(dims or shapes[role], dtype=np.float32)) for role, dims in names.items()}
    return {role: torch.from_numpy(array) if kind == "torch" else array for role, array in arrays.items()}


def plan(policy: Policy, *, outputs: Any = (), pinned: Any = None, **arrays: Any) -> Selecting:
    roles = dict.fromkeys(ROLES) | {"values": None} | (arrays or given())
    terms = CallTerms(policy, ROPE, outputs=outputs)
    return selecting(roles, terms=terms, pinned=pinned, encoding="auto")


def header_of(own: Selecting) -> messages.Header:
    return messages.read_header(next(own.requests()).header)


def sent_by(own: Selecting) -> tuple[messages.Header, list[messages.Descriptor]]:
    """The header, and what layer 1 sends; all sizes that were declared hold."""
    sent = list(own.requests())
    header = messages.read_header(sent[0].header)
    described = [messages.read_descriptor(one) for message in sent for one in message.descriptors]
    for layer in range(LAYERS):
        assert sum(one.byte_length for one in described if one.layer == layer) <= header.largest_layer_bytes
    assert own.call.sent_bytes <= header.total_bytes
    return header, [one for one in described if one.layer == 1]


COARSE: dict[str, dict[str, Any]] = {
    "layer": {"granularity": "layer"},
    "model": {"granularity": "model"},
    "pages": {"page_size": 4},
    "layer's pages": {"granularity": "layer", "page_size": 4},
    "adaptive heads": {"budget_allocation": "adaptive_heads"},
}


@pytest.mark.parametrize("fields", COARSE.values(), ids=COARSE)
def test_all_scores_travel_beside_the_candidates_and_the_sizes_are_exact(fields: dict[str, Any]) -> None:
    own = plan(policy(**fields))
    header, described = sent_by(own)
    width = 24
    assert [(one.role, one.dims, one.count) for one in described] == [
        ("candidate_ids", (HEADS, width), 0),
        ("scores", (HEADS, TOKENS), TOKENS),
        ("keys", (HEADS, width, DIM), 0),
    ]
    size = HEADS * (width * 4 + TOKENS * 4 + width * DIM * 4)
    assert header.largest_layer_bytes == size
    assert own.call.sent_bytes == header.total_bytes == LAYERS * size


def test_so_they_do_for_the_updated_scores_of_every_head_and_the_positions_go_along() -> None:
    rotated = policy(graph=Graph(candidates=2.0, similarity="pre_rope"))
    inputs = given() | {"positions": torch.arange(TOKENS).repeat(LAYERS, 1) * 3}
    own = plan(rotated, outputs=["updated_scores"], **inputs)
    header, described = sent_by(own)
    assert {one.role: one.dims for one in described} == {
        "candidate_ids": (HEADS, 24),
        "scores": (HEADS, TOKENS),
        "keys": (HEADS, 24, DIM),
        "positions": (HEADS, 24),
    }
    assert own.call.sent_bytes == header.total_bytes
    others = plan(rotated, outputs=["keep_mask", "decay_factors", "moves"], **inputs)
    assert [one.role for one in sent_by(others)[1]] == ["candidate_ids", "scores", "row_facts", "keys", "positions"]


def test_similarity_keys_stand_in_for_the_candidates_keys() -> None:
    inputs = given() | {"similarity_keys": given(keys=(LAYERS, HEADS, TOKENS, 5))["keys"]}
    own = plan(policy(graph=Graph(candidates=2.0, similarity="pre_rope"), granularity="layer"), **inputs)
    header, described = sent_by(own)
    assert [(one.role, one.dims) for one in described][2:] == [("similarity_keys", (HEADS, 24, 5))]
    assert own.call.sent_bytes == header.total_bytes


@pytest.mark.parametrize("fields", [*COARSE.values()][:4], ids=[*COARSE][:4])
def test_where_rows_vote_the_candidates_are_enough(fields: dict[str, Any]) -> None:
    own = plan(policy(graph=SEQUENTIAL, **fields))
    header, described = sent_by(own)
    assert [one.role for one in described] == ["candidate_ids", "scores", "row_facts", "keys"]
    assert {one.count for one in described} == {0}
    assert own.call.sent_bytes == header.total_bytes == LAYERS * HEADS * (24 * (8 + DIM * 4) + 24)


@pytest.mark.parametrize("fields", COARSE.values(), ids=COARSE)
@pytest.mark.parametrize("graph", [None, Graph(strength=0.0)], ids=["no graph", "strength 0"])
def test_where_nothing_propagates_the_scores_are_enough(fields: dict[str, Any], graph: Graph | None) -> None:
    own = plan(policy(graph=graph, **fields), **given(), positions=torch.arange(TOKENS).repeat(LAYERS, 1))
    header, described = sent_by(own)
    assert [(one.role, one.dims, one.count) for one in described] == [("scores", (HEADS, TOKENS), TOKENS)]
    assert own.call.sent_bytes == header.total_bytes == LAYERS * HEADS * TOKENS * 4


@pytest.mark.parametrize("fields", COARSE.values(), ids=COARSE)
def test_where_all_keys_are_compared_they_go_with_the_scores(fields: dict[str, Any]) -> None:
    own = plan(policy(graph=ALL_COMPARED, **fields))
    header, described = sent_by(own)
    assert [(one.role, one.count) for one in described] == [("keys", TOKENS), ("scores", TOKENS)]
    assert own.call.sent_bytes == header.total_bytes


@pytest.mark.parametrize("fields", COARSE.values(), ids=COARSE)
def test_a_prompt_that_is_kept_whole_sends_the_facts_alone(fields: dict[str, Any]) -> None:
    own = plan(policy(TOKENS, **fields), outputs=["updated_scores", "keep_mask"])
    header, described = sent_by(own)
    assert [one.role for one in described] == ["row_facts"]
    assert own.call.sent_bytes == header.total_bytes == LAYERS * HEADS * 24


def test_a_budget_that_is_all_always_kept_still_sends_the_scores_it_is_measured_by() -> None:
    own = plan(policy(WINDOW, granularity="layer"))
    header, described = sent_by(own)
    assert [one.role for one in described] == ["scores"]
    assert own.call.sent_bytes == header.total_bytes


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("fields", "roles", "travels"),
    [
        ({}, ("keys", "queries"), {"keys", "queries"}),
        ({}, ("keys", "attention"), {"keys", "attention"}),
        ({"graph": None}, ("keys", "queries"), {"keys", "queries"}),
        ({"graph": None}, ("keys", "attention"), {"attention"}),
        ({"graph": None, "scorer": "tova"}, ("keys", "attention"), {"attention"}),
        ({"graph": None, "scorer": "knorm"}, ("keys", "attention"), {"keys", "attention"}),
        ({"scorer": "keydiff"}, ("keys", "queries"), {"keys", "queries"}),
    ],
)
def test_cake_budgets_send_what_was_given(kind: str, fields: dict[str, Any], roles: Any, travels: set[str]) -> None:
    arrays = given(kind, **dict.fromkeys(roles, ()))
    own = plan(policy(budget_allocation="cake", **fields), **arrays)
    header, described = sent_by(own)
    assert {one.role for one in described} == travels
    for one in described:
        assert one.dims == tuple(arrays[one.role].shape[1:])
        assert one.count == (TOKENS if one.role in ("keys", "attention") else 0)
    assert own.call.sent_bytes == header.total_bytes == sum(arrays[role].nbytes for role in travels)
    assert "prescore" not in own.call.summary(seconds={}).seconds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_a_tensor_of_any_dtype_and_strides_goes_whole(dtype: torch.dtype) -> None:
    arrays = {role: array.to(dtype)[:, :, ::2] for role, array in given(keys=(2, 3, 61, 8), queries=(2, 6, 8, 8)).items()}
    own = plan(policy(budget_allocation="cake"), **arrays)
    payload = b"".join(chunk.data for message in own.requests() for chunk in message.chunks)
    raw = [arrays[role][layer].contiguous().view(torch.uint8).numpy() for layer in range(2) for role in ("keys", "queries")]
    assert payload == b"".join(one.tobytes() for one in raw)


def test_the_header_names_the_outputs_each_once() -> None:
    own = plan(policy(), outputs=["moves", "updated_scores", "moves"])
    assert header_of(own).outputs == ("updated_scores", "moves")
    assert header_of(plan(policy())).outputs == ()


WRONG_OUTPUTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "an unknown name": (["scores"], {}, "UNKNOWN_NAME"),
    "no name": ([3], {}, "UNKNOWN_NAME"),
    "a string": ("moves", {}, "BAD_SHAPE"),
    "nothing": (None, {}, "BAD_SHAPE"),
    "a shared head's factors": (["decay_factors"], {"granularity": "layer"}, "BAD_SHAPE"),
    "no order": (["choice_order"], {}, "BAD_SHAPE"),
    "a page's order": (["choice_order"], {"graph": SEQUENTIAL, "page_size": 4}, "BAD_SHAPE"),
}


@pytest.mark.parametrize("name", WRONG_OUTPUTS)
def test_an_output_that_cannot_be_is_refused_before_anything_is_sent(name: str) -> None:
    outputs, fields, reason = WRONG_OUTPUTS[name]
    nobody: dict[str, Any] = {"policy": policy(**fields), "outputs": outputs}
    with CompressClient("127.0.0.1:9") as client:
        for call in (
            lambda: client.select(**given(), rope=ROPE, **nobody),
            lambda: client.stream(num_layers=2, rope=ROPE, **nobody),
            lambda: AsyncCompressClient("127.0.0.1:9").stream(num_layers=2, rope=ROPE, **nobody),
            lambda: AsyncCompressClient("127.0.0.1:9").select(**given(), rope=ROPE, **nobody).send(None),
        ):
            with pytest.raises(InvalidInputError) as raised:
                call()
            assert (raised.value.argument, raised.value.reason) == ("outputs", reason)


# --- answers ------------------------------------------------------------------------------------------------------------


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(
    "fields", [{"granularity": "layer"}, {"granularity": "layer", "page_size": 4}], ids=["tokens", "pages"]
)
def test_heads_that_share_an_answer_have_one_row(kind: str, fields: dict[str, Any]) -> None:
    own = plan(policy(**fields), outputs=["updated_scores", "keep_mask", "moves"], **given(kind))
    header = header_of(own)
    outputs = {
        "updated_scores": np.arange(TOKENS, dtype=np.float32),
        "keep_mask": np.arange(TOKENS) % 2 == 0,
        "moves": np.array([[0, 5, 0]], np.int32),
    }
    for layer in range(LAYERS):
        made = answer(header, layer, indices=ints(2, 5, 15), outputs=outputs, **shared(fields))
        (selection,) = own.call.fold(made)
    own.call.fold(end_of(header))
    selection = own.result(seconds=0).layers[1]  # type: ignore[union-attr]
    assert (selection.granularity, selection.page_size) == ("layer", fields.get("page_size"))
    of_kind = torch.Tensor if kind == "torch" else np.ndarray
    assert isinstance(selection.indices, of_kind)
    assert selection.indices.tolist() == [2, 5, 15]
    assert list(selection.outputs) == ["updated_scores", "keep_mask", "moves"]
    for name, wanted in outputs.items():
        found = selection.outputs[name]
        assert isinstance(found, of_kind)
        assert np.asarray(found).dtype == wanted.dtype
        assert np.array_equal(np.asarray(found), wanted)


def shared(fields: dict[str, Any]) -> dict[str, Any]:
    return {"granularity": fields.get("granularity", "head"), "page_size": fields.get("page_size")}


def test_a_model_has_one_answer_a_prompt() -> None:
    batch = {role: [array, array] for role, array in given().items()}
    own = plan(policy(granularity="model"), **batch)
    header = header_of(own)
    common = {"indices": ints(3, 60), "granularity": "model"}
    own.call.fold(answer(header, 0, prompt=1, **common))
    own.call.fold(end_of(header))
    with pytest.raises(InternalError, match="without 1 prompts"):
        own.call.close()
    with pytest.raises(InternalError, match="layer 1 of prompt 0, which was not asked for"):
        own.call.fold(answer(header, 1, **common))
    with pytest.raises(InternalError, match="layer 0 of prompt 1, which was not asked for"):
        own.call.fold(answer(header, 0, prompt=1, **common))
    own.call.fold(answer(header, 0, **common))
    selections = own.result(seconds=0)
    assert isinstance(selections, list)
    assert [len(one) for one in selections] == [1, 1]
    assert selections[1].indices[0].tolist() == [3, 60]
    assert [one.layers[0].prompt for one in selections] == [0, 1]


def test_without_a_layer_the_message_counts_layers() -> None:
    own = plan(policy(granularity="layer"))
    header = header_of(own)
    own.call.fold(answer(header, 1, indices=ints(3, 60), granularity="layer"))
    own.call.fold(end_of(header))
    with pytest.raises(InternalError, match="without 1 layers"):
        own.call.close()


MASK = np.ones((HEADS, TOKENS), bool)
NOT_ASKED: dict[str, tuple[dict[str, Any], list[str], dict[str, Any]]] = {
    "an output is missing": ({}, ["keep_mask", "moves"], {"outputs": {"keep_mask": MASK}}),
    "none was asked for": ({}, [], {"outputs": {"keep_mask": MASK}}),
    "another": ({}, ["keep_mask"], {"outputs": {"updated_scores": MASK.astype(np.float32)}}),
    "of another length": ({}, ["keep_mask"], {"outputs": {"keep_mask": MASK[:, 1:]}}),
    "of one head": ({}, ["keep_mask"], {"outputs": {"keep_mask": MASK[:1]}}),
    "no such page": ({"page_size": 4}, [], {"indices": np.tile(ints(0, 16), (HEADS, 1)), "page_size": 4}),
    "tokens for pages": ({"page_size": 4}, [], {"indices": np.tile(ints(0, 7), (HEADS, 1))}),
    "pages for tokens": ({}, [], {"indices": np.tile(ints(0, 7), (HEADS, 1)), "page_size": 4}),
    "a row too many": ({}, [], {"indices": np.tile(ints(0, 7), (HEADS + 1, 1))}),
    "a row a head, for the layer": ({"granularity": "layer"}, [], {"indices": np.tile(ints(0, 7), (HEADS, 1))}),
}


@pytest.mark.parametrize("name", NOT_ASKED)
def test_an_answer_to_something_else_is_none(name: str) -> None:
    fields, outputs, answered = NOT_ASKED[name]
    own = plan(policy(**fields), outputs=outputs)
    header = header_of(own)
    with pytest.raises(InternalError):
        own.call.fold(answer(header, 0, **answered))
    with pytest.raises(InternalError):
        own.call.close()
