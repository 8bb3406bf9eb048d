"""What the newer forms, budgets and answers refuse, through a real server in raw protobuf; and that nothing stays of it."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from graphkv_proto import v1 as pb
from graphkv_testing.forms import call_of
from graphkv_testing.process import Server, serve
from graphkv_testing.raw import RawCall, assert_good, call

from graphkv import Graph, Policy

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
GRAPH = Graph(threshold=0.2, candidates=1.5)
LAYER = Policy(7, window=2, graph=GRAPH, granularity="layer")
BASE = Policy(7, window=2, graph=None, granularity="layer")
MODEL = Policy(7, window=2, graph=GRAPH, granularity="model")
CAKE = Policy(7, window=2, graph=GRAPH, budget_allocation="cake")
HEADS = Policy(7, window=2, graph=GRAPH)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--max-bytes-in-flight", "1MiB", "--stall-timeout", "5", "--device", "cpu") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(server: Server) -> Iterator[None]:
    yield
    assert server.settled(), server.metrics()
    assert_good(server.address)


def of(policy: Policy, form: str) -> RawCall:
    return call_of(policy, form, window=2, seed=3)


def without(policy: Policy, form: str, role: int) -> RawCall:
    """The last layer lacks one of its tensors."""
    sent = of(policy, form)
    sent.tensors = [entry for entry in sent.tensors if entry[:2] != (1, role)]
    return sent


def with_more(policy: Policy, form: str, role: int, array: Any, count: int = 0, *, place: int = 0) -> RawCall:
    """The first layer has one tensor more."""
    sent = of(policy, form)
    sent.tensors.insert(place, (0, role, array, count))
    sent.header.largest_layer_bytes += array.nbytes
    sent.header.total_bytes += array.nbytes
    return sent


def changed(policy: Policy, form: str, role: int, change: Callable[[Any], tuple[Any, int]]) -> RawCall:
    """A tensor of the first layer is another one."""
    sent = of(policy, form)
    for place, (layer, own, array, _) in enumerate(sent.tensors):
        if (layer, own) == (0, role):
            sent.tensors[place] = (layer, own, *change(array.copy()))
    return sent


def with_header(policy: Policy, form: str = "whole", **fields: Any) -> RawCall:
    sent = of(policy, form)
    sent.header.MergeFrom(pb.Header(**fields))
    return sent


def holding(value: float) -> Callable[[Any], tuple[Any, int]]:
    def change(scores: Any) -> tuple[Any, int]:
        scores[1, 5] = value
        return scores, scores.shape[1]

    return change


def beyond(ids: Any) -> tuple[Any, int]:
    ids[1, -1] = 23
    return ids, 0


FACTS, SCORES, IDS, KEYS, QUERIES = pb.ROLE_ROW_FACTS, pb.ROLE_SCORES, pb.ROLE_CANDIDATE_IDS, pb.ROLE_KEYS, pb.ROLE_QUERIES
facts, ids, scores = np.zeros((2, 3)), np.zeros((2, 7), np.int32), np.zeros((2, 23), np.float32)
CASES: dict[str, tuple[Callable[[], RawCall], grpc.StatusCode, str, str]] = {
    "facts beside all scores": (lambda: with_more(LAYER, "narrowed", FACTS, facts), INVALID, "BAD_LAYOUT", "descriptor.role"),
    "scores of candidates alone": (
        lambda: changed(LAYER, "narrowed", SCORES, lambda all_scores: (all_scores[:, :11], 0)),
        INVALID, "BAD_SHAPE", "descriptor.dims",
    ),
    "all scores where candidates' do": (
        lambda: changed(HEADS, "narrowed", SCORES, lambda _: (scores, 23)), INVALID, "BAD_LAYOUT", "descriptor.role",
    ),
    "no candidates": (lambda: without(LAYER, "narrowed", IDS), INVALID, "INCOMPLETE", "end"),
    "no scores": (lambda: without(LAYER, "narrowed", SCORES), INVALID, "INCOMPLETE", "end"),
    "no keys": (lambda: without(LAYER, "narrowed", KEYS), INVALID, "INCOMPLETE", "end"),
    "scores alone where keys are compared": (lambda: without(LAYER, "scores", KEYS), INVALID, "INCOMPLETE", "end"),
    "half of all scores": (
        lambda: changed(LAYER, "narrowed", SCORES, lambda every: (every[:, :12], 12)), INVALID, "INCOMPLETE", "end",
    ),
    "scores of some tokens twice": (
        lambda: with_more(LAYER, "narrowed", SCORES, scores[:, :9], 9), INVALID, "BAD_LAYOUT", "descriptor.start",
    ),
    "queries beside all scores": (
        lambda: with_more(LAYER, "narrowed", QUERIES, np.zeros((4, 2, 8), np.float32), place=2),
        INVALID, "BAD_LAYOUT", "descriptor.role",
    ),
    "candidates where nothing narrows": (
        lambda: with_more(BASE, "scores", IDS, ids, place=1), INVALID, "BAD_LAYOUT", "descriptor.role",
    ),
    "a candidate beyond the prompt": (
        lambda: changed(LAYER, "narrowed", IDS, beyond), INVALID, "BAD_SHAPE", "candidate_ids",
    ),
    "a score that is NaN": (lambda: changed(LAYER, "narrowed", SCORES, holding(np.nan)), INVALID, "NON_FINITE", "scores"),
    "a model's score that is +inf": (
        lambda: changed(MODEL, "narrowed", SCORES, holding(np.inf)), INVALID, "NON_FINITE", "scores",
    ),
    "candidates for cake": (lambda: with_more(CAKE, "whole", IDS, ids), INVALID, "BAD_LAYOUT", "descriptor.role"),
    "scores for cake": (lambda: with_more(CAKE, "whole", SCORES, scores, 23), INVALID, "BAD_SHAPE", "descriptor.role"),
    "the caller's scores for cake": (
        lambda: with_header(CAKE, importance=pb.IMPORTANCE_CALLER), INVALID, "BAD_SHAPE", "scores",
    ),
    "no queries for cake": (lambda: without(CAKE, "whole", QUERIES), INVALID, "INCOMPLETE", "end"),
    "no keys for cake": (lambda: without(CAKE, "whole", KEYS), INVALID, "INCOMPLETE", "end"),
    "a layer's queries that are NaN for cake": (
        lambda: changed(CAKE, "whole", QUERIES, lambda queries: (queries * np.nan, 0)), INVALID, "NON_FINITE", "queries",
    ),
    "an output of a later version": (lambda: with_header(HEADS, outputs=[7]), UNIMPLEMENTED, "UNKNOWN_NAME", "outputs[0]"),
    "an order that nobody chose in": (
        lambda: with_header(HEADS, outputs=[pb.OUTPUT_CHOICE_ORDER]), INVALID, "BAD_SHAPE", "outputs",
    ),
    "a whole model that never fits": (
        lambda: with_header(CAKE, largest_layer_bytes=2**19 + 1, total_bytes=2**20), INVALID, "TOO_LARGE", "total_bytes",
    ),
    "parts that never fit": (lambda: with_header(MODEL, layers=900), INVALID, "TOO_LARGE", "total_bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_request_gets_its_status_reason_and_field(server: Server, name: str) -> None:
    make, code, reason, field = CASES[name]
    got = call(server.address, make().messages(chunk=200))
    assert (got.code, got.reason) == (code, reason), got.message
    assert any(known == field or known.endswith("." + field) for known in got.fields or [got.info.get("argument", "")]), got


def test_a_score_that_is_not_finite_is_named_by_layer_head_and_token(server: Server) -> None:
    got = call(server.address, CASES["a score that is NaN"][0]().messages())
    assert "layer 0, KV head 1, token 5" in got.message
