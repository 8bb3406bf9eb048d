"""What a stream was given, before any socket: which work may go, in which order, and what does not fit."""

from typing import Any

import numpy as np
import pytest
import torch
from graphkv_client import Graph, InvalidInputError, Policy, _puts
from graphkv_client._feed import Feed
from graphkv_client._inputs import CallTerms
from graphkv_client._pieces import Work

POLICY = Policy(9, window=4)
ALL_COMPARED = Policy(9, window=4, graph=Graph(candidates=None))
ROLES = (
    "keys",
    "queries",
    "attention",
    "scores",
    "values",
    "query_mean",
    "query_covariance",
    "similarity_keys",
    "positions",
)
TOKENS = 21


def feed(policy: Policy = POLICY, *, layers: int = 2, tokens: Any = TOKENS, pinned: Any = None, layout: str = "HND") -> Feed:
    return Feed(CallTerms(policy, layout=layout), layers=layers, tokens=tokens, pinned=pinned)


def keys(count: int = TOKENS, *, heads: int = 2, dim: int = 8) -> Any:
    return np.ones((heads, count, dim), np.float32)


def queries(heads: int = 4, window: int = 4) -> Any:
    return np.ones((heads, window, 8), np.float32)


def put(own: Feed, layer: int, *, start: int | None = None, prompt: int = 0, copy: bool = False, **given: Any) -> None:
    read = own.read(layer, {role: given.get(role) for role in ROLES}, prompt=prompt, start=start)
    own.add(read.copy() if copy else read)


def taken(own: Feed) -> list[Work]:
    works = []
    while (work := own.take()) is not None:
        works.append(work)
    return works


def as_torch(**given: Any) -> dict[str, Any]:
    return {role: torch.from_numpy(array) for role, array in given.items()}


def test_a_whole_layer_goes_at_once_and_tells_the_length() -> None:
    own = feed(tokens=None)
    put(own, 1, keys=keys(), queries=queries())
    assert own.prompts == ((TOKENS, ()),)
    (work,) = taken(own)
    assert (work.prompt, work.layer, work.roles) == (0, 1, ("keys", "queries"))
    assert not own.complete
    assert "1 of 2 layers were not put; the first is layer 0" in own.missing()
    put(own, 0, keys=keys(), queries=queries())
    assert own.complete


def test_chunks_wait_until_the_first_queries_and_then_go_as_they_come() -> None:
    own = feed()
    put(own, 0, keys=keys(5), start=0)
    put(own, 1, keys=keys(5), start=0)
    assert own.idle, "the header states the sizes of the queries too"
    put(own, 0, keys=keys(16), queries=queries(), start=5)
    assert [(work.layer, len(work.ahead)) for work in taken(own)] == [(0, 2), (1, 1)]
    put(own, 1, keys=keys(7), start=14)
    assert [(work.layer, work.ahead[0].start) for work in taken(own)] == [(1, 14)]
    assert "layer 1, of which 12 of 21 tokens came" in own.missing()


@pytest.mark.parametrize("policy", [Policy(9, scorer="knorm", window=0), Policy(9, scorer="given")], ids=["knorm", "given"])
def test_where_no_queries_can_come_the_first_chunk_goes(policy: Policy) -> None:
    own = feed(policy)
    put(own, 0, keys=keys(5), start=0)
    assert len(taken(own)) == 1


@pytest.mark.parametrize("scorer", ["knorm", "keydiff"])
def test_a_cake_budget_waits_for_the_queries_whatever_the_scorer(scorer: str) -> None:
    for of_kind in (dict, as_torch):
        own = feed(Policy(9, scorer=scorer, window=4, budget_allocation="cake"))
        put(own, 0, start=0, **of_kind(keys=keys(5)))
        assert own.idle
        put(own, 0, start=5, **of_kind(keys=keys(16), queries=queries()))
        (work,) = taken(own)
        assert (len(work.ahead), work.roles, work.whole) == (2, ("keys", "queries"), ())
        put(own, 1, start=5, **of_kind(keys=keys(16)))
        assert len(taken(own)) == 1, "also of a tensor, chunks go as they come: nothing is narrowed"


def test_all_that_a_scorer_needs_is_in_the_form() -> None:
    own = Feed(
        CallTerms(Policy(9, scorer="expected_attention", window=4, budget_allocation="cake")), layers=1, tokens=21, pinned=None
    )
    chunk = {"values": np.ones((2, 5, 3), np.float32), "queries": queries()}
    put(own, 0, start=0, keys=keys(5), **chunk)
    assert own.idle, "the header states the sizes of query_mean and query_covariance too"
    extras = {"query_mean": np.ones((4, 8), np.float32), "query_covariance": np.ones((4, 8, 8), np.float32)}
    put(own, 0, start=5, keys=keys(16), values=np.ones((2, 16, 3), np.float32), **extras)
    assert len(taken(own)) == 1
    assert own.complete


def test_candidates_are_chosen_from_whole_layers() -> None:
    own = feed()
    put(own, 0, start=10, **as_torch(keys=keys(11), queries=queries()))
    assert own.preparation is not None
    assert own.idle
    put(own, 0, start=0, **as_torch(keys=keys(10)))
    (work,) = taken(own)
    assert not work.ahead
    assert sorted(part.start for part in work.whole) == [0, 10]


def test_where_all_keys_are_compared_they_go_as_they_come() -> None:
    own = feed(ALL_COMPARED)
    put(own, 0, start=10, **as_torch(keys=keys(11), queries=queries()))
    (first,) = taken(own)
    assert (first.roles, first.whole) == (("keys",), ())
    put(own, 0, start=0, **as_torch(keys=keys(10)))
    (last,) = taken(own)
    assert len(last.ahead) == 1
    assert len(last.whole) == 2
    roles = [piece.role for piece in last.pieces(own.preparation)]  # type: ignore[arg-type]
    assert roles == ["keys", "scores"], "never the queries, whose scores are computed here"


def test_keys_that_nobody_reads_stay_here() -> None:
    own = feed(Policy(9, window=4, graph=None), tokens=None)
    put(own, 0, keys=keys(), scores=np.ones((2, TOKENS), np.float32))
    (work,) = taken(own)
    assert [piece.role for piece in work.pieces(own.preparation)] == ["scores"]  # type: ignore[arg-type]


def test_copies_are_counted_until_they_are_sent() -> None:
    own, array = feed(tokens=None), keys()
    put(own, 0, keys=array, queries=queries(), copy=True)
    assert own.copied == array.nbytes + queries().nbytes
    array[:] = 7
    (work,) = taken(own)
    assert float(work.ahead[0].arrays["keys"].max()) == 1.0
    own.sent(work)
    assert own.copied == 0


def test_copies_of_a_layer_that_is_held_are_counted_until_it_is_whole() -> None:
    own = feed(ALL_COMPARED)
    put(own, 0, start=0, copy=True, **as_torch(keys=keys(10), queries=queries()))
    for work in taken(own):
        own.sent(work)
    assert own.copied == keys(10).nbytes + queries().nbytes, "the scores are computed from them later"
    put(own, 0, start=10, **as_torch(keys=keys(11)))
    for work in taken(own):
        own.sent(work)
    assert own.copied == 0


def test_prompts_of_a_batch() -> None:
    own = feed(tokens=[TOKENS, 5], layers=1, pinned=[None, [(0, 2)]])
    put(own, 0, prompt=1, keys=keys(5), queries=queries())
    put(own, 0, prompt=0, keys=keys(4), start=0)
    assert not own.complete
    assert "layer 0 of prompt 0, of which 4 of 21 tokens came" in own.missing()
    put(own, 0, prompt=0, keys=keys(17), queries=queries(), start=4)
    assert own.complete


@pytest.mark.parametrize(
    ("arguments", "argument", "reason"),
    [
        ({"layer": 2}, "layer", "BAD_SHAPE"),
        ({"layer": True}, "layer", "BAD_SHAPE"),
        ({"prompt": 1}, "prompt", "BAD_SHAPE"),
        ({"keys": None}, "keys", "BAD_SHAPE"),
        ({"keys": keys(22)}, "keys", "BAD_SHAPE"),
        ({"keys": keys(5)}, "keys", "BAD_SHAPE"),
        ({"keys": keys(5), "start": 17}, "keys", "BAD_LAYOUT"),
        ({"keys": keys(0), "start": 0}, "keys", "BAD_LAYOUT"),
        ({"start": -1}, "start", "BAD_LAYOUT"),
        ({"queries": queries(window=3)}, "queries", "BAD_SHAPE"),
        ({"queries": queries(heads=3)}, "query_heads", "BAD_SHAPE"),
        ({"queries": None}, "queries", "BAD_SHAPE"),
        ({"attention": np.ones((4, 4, TOKENS), np.float32)}, "attention", "BAD_SHAPE"),
        ({"queries": None, "scores": np.ones((2, 20), np.float32)}, "scores", "BAD_SHAPE"),
    ],
)
def test_a_put_that_does_not_fit_changes_nothing(arguments: dict[str, Any], argument: str, reason: str) -> None:
    own = feed()
    given = {"layer": 0, "keys": keys(), "queries": queries(), **arguments}
    with pytest.raises(InvalidInputError) as raised:
        put(own, **given)
    assert (raised.value.argument, raised.value.reason) == (argument, reason)
    assert own.idle
    put(own, 0, keys=keys(), queries=queries())
    assert len(taken(own)) == 1


@pytest.mark.parametrize(
    ("second", "argument", "reason"),
    [
        ({"layer": 0}, "layer", "BAD_LAYOUT"),
        ({"keys": keys(heads=4)}, "keys", "BAD_SHAPE"),
        ({"keys": keys().astype(np.float16)}, "keys", "BAD_SHAPE"),
        ({"queries": queries(heads=8)}, "queries", "BAD_SHAPE"),
        ({"queries": None, "scores": np.ones((2, TOKENS), np.float32)}, "queries", "BAD_SHAPE"),
        ({"positions": np.arange(TOKENS)}, "positions", "BAD_SHAPE"),
        (as_torch(keys=keys(), queries=queries()), "keys", "BAD_SHAPE"),
    ],
    ids=["twice", "heads", "dtype", "query heads", "another source", "another role", "another kind"],
)
def test_layers_of_a_stream_are_alike(second: dict[str, Any], argument: str, reason: str) -> None:
    own = feed()
    put(own, 0, keys=keys(), queries=queries())
    with pytest.raises(InvalidInputError) as raised:
        put(own, **{"layer": 1, "keys": keys(), "queries": queries(), **second})
    assert (raised.value.argument, raised.value.reason) == (argument, reason)
    put(own, 1, keys=keys(), queries=queries())
    assert own.complete


@pytest.mark.parametrize(
    ("chunk", "argument"),
    [
        ({"keys": keys(5).astype(np.float16)}, "keys"),
        ({"keys": keys(5, heads=4)}, "keys"),
        ({"keys": keys(5), "positions": np.arange(5)}, "positions"),
        ({"keys": keys(5), "positions": np.array(3)}, "positions"),
        ({"keys": keys(5), "queries": queries(heads=8)}, "queries"),
        ({"keys": keys(5), "scores": np.ones(5, np.float32)}, "scores"),
    ],
    ids=["dtype", "heads", "another role", "a scalar", "query heads", "rank"],
)
def test_a_chunk_is_checked_before_it_goes(chunk: dict[str, Any], argument: str) -> None:
    own = feed()
    put(own, 0, keys=keys(), queries=queries())
    taken(own)
    with pytest.raises(InvalidInputError) as raised:
        put(own, 1, start=3, **chunk)
    assert (raised.value.argument, raised.value.reason) == (argument, "BAD_SHAPE")
    assert own.idle


@pytest.mark.parametrize(
    ("second", "argument", "reason"),
    [
        ({"keys": keys(5), "start": 4}, "start", "BAD_LAYOUT"),
        ({"keys": keys(16, dim=4), "start": 5}, "keys", "BAD_SHAPE"),
        ({"keys": keys(16).astype(np.float16), "start": 5}, "keys", "BAD_SHAPE"),
        ({"start": 5, **as_torch(keys=keys(16))}, "keys", "BAD_SHAPE"),
        ({"keys": keys(16), "start": 5, "queries": queries()}, "queries", "BAD_LAYOUT"),
        ({"keys": keys(16), "start": 5, "scores": np.ones((2, 16), np.float32)}, "scores", "BAD_SHAPE"),
    ],
    ids=["overlap", "head_dim", "dtype", "kind", "queries twice", "two sources"],
)
def test_chunks_of_a_layer_fit_together(second: dict[str, Any], argument: str, reason: str) -> None:
    own = feed()
    put(own, 0, keys=keys(5), queries=queries(), start=0)
    with pytest.raises(InvalidInputError) as raised:
        put(own, 0, **second)
    assert (raised.value.argument, raised.value.reason) == (argument, reason)
    put(own, 0, keys=keys(16), start=5)
    assert "1 of 2" in own.missing()


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"layers": 0}, "num_layers"),
        ({"layers": 2.0}, "num_layers"),
        ({"tokens": 0}, "num_tokens"),
        ({"tokens": []}, "num_tokens"),
        ({"tokens": [3, -1]}, "num_tokens"),
        ({"tokens": [3, 4], "pinned": [(0, 2)]}, "pinned"),
        ({"tokens": 3, "pinned": [(0, 4)]}, "pinned"),
        ({"policy": None}, "policy"),
        ({"layout": "hnd"}, "layout"),
    ],
)
def test_a_wrong_stream_is_refused_at_once(arguments: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidInputError) as raised:
        feed(**arguments)
    assert raised.value.argument == argument


def test_a_chunk_needs_the_length() -> None:
    own = feed(tokens=None)
    with pytest.raises(InvalidInputError, match="num_tokens") as raised:
        put(own, 0, keys=keys(5), start=3)
    assert raised.value.argument == "start"


@pytest.mark.parametrize("other", [keys(16).astype(np.float16), torch.from_numpy(keys(16))], ids=["dtype", "kind"])
@pytest.mark.parametrize("layer", [0, 1])
def test_chunks_are_alike_before_the_form_is_known(other: Any, layer: int) -> None:
    own = feed()
    put(own, 0, keys=keys(5), start=0)
    assert own.form is None
    with pytest.raises(InvalidInputError) as raised:
        put(own, layer, keys=other, start=5)
    assert (raised.value.argument, raised.value.reason) == ("keys", "BAD_SHAPE")
    put(own, 0, keys=keys(16), queries=queries(), start=5)
    assert len(taken(own)) == 1


@pytest.mark.parametrize(
    "order", [range(60), reversed(range(60)), (*range(0, 60, 2), *range(1, 60, 2))], ids=["up", "down", "gaps"]
)
def test_a_layer_a_token_at_a_time(order: Any) -> None:
    own, left = feed(layers=1, tokens=60), list(order)
    for start in left[:-1]:
        put(own, 0, keys=keys(1), start=start)
        with pytest.raises(InvalidInputError, match="put before") as raised:
            put(own, 0, keys=keys(1), start=start)
        assert raised.value.argument == "start"
    assert "59 of 60 tokens came" in own.missing()
    put(own, 0, keys=keys(1), queries=queries(), start=left[-1])
    assert own.complete


def test_a_put_costs_the_same_however_many_came(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    joined = _puts._joined
    monkeypatch.setattr(_puts, "_joined", lambda role, *dims: looked.append(role) or joined(role, *dims))
    own = feed(layers=1, tokens=500)
    for start in range(499):
        put(own, 0, keys=keys(1), start=start)
    assert len(looked) == 499
    assert own._layers[0, 0]._ranges == [(0, 499)]


def test_numpys_integers_are_integers() -> None:
    own = Feed(CallTerms(POLICY), layers=np.int64(1), tokens=[np.int32(TOKENS), np.int64(5)], pinned=None)  # type: ignore[list-item, arg-type]
    put(own, np.int64(0), prompt=np.int32(1), keys=keys(5), queries=queries())  # type: ignore[arg-type]
    put(own, np.int64(0), start=np.uint8(16), keys=keys(5), queries=queries())  # type: ignore[arg-type]
    put(own, np.int64(0), start=np.uint8(0), keys=keys(16))  # type: ignore[arg-type]
    assert own.complete
    assert {type(one) for place in own.answers for one in place} == {int}
    assert all(type(work.ahead[0].start) is int for work in taken(own))
    with pytest.raises(InvalidInputError):
        feed(layers=np.bool_(True))  # type: ignore[arg-type]
