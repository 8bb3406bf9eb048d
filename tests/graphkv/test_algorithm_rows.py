"""One test for each row and formula of docs/algorithm.md, named after it, small enough to check by hand.

The many cases are in test_select_against_reference.py; here a reader sees each rule alone. Keys are written as their pairwise
cosines allow: unit vectors of a plane by their angle, or axes. The table at the end of docs/algorithm.md leads here.
"""

import math
from typing import Any

import pytest
import torch

from graphkv import Graph, InvalidInputError, Policy, Rope, select
from graphkv.terms.catalogue import BUDGETS, GRANULARITIES, SCORERS, SIGNALS, SIMILARITIES, UPDATES

PAPER = {"neighbors": "auto", "threshold": 0.0, "candidates": None}


def kept(
    scores: list[float], keys: list[list[float]], budget: int, /, *, graph: dict[str, Any] | None, **fields: Any
) -> list[int]:
    """The tokens that one head keeps."""
    chosen = select(
        torch.tensor(keys, dtype=torch.float32)[None, None],
        scores=torch.tensor(scores)[None, None],
        policy=Policy(budget, scorer="given", graph=None if graph is None else Graph(**graph), **fields),
    )
    return torch.as_tensor(chosen.indices[0][0]).tolist()


def axis(place: int) -> list[float]:
    return [1.0 if place == here else 0.0 for here in range(8)]


def towards(place: int, cosine: float, *, aside: int) -> list[float]:
    """A unit key whose cosine to that axis is `cosine`; the rest of it lies along another."""
    key = [0.0] * 8
    key[place], key[aside] = cosine, math.sqrt(1 - cosine * cosine)
    return key


# --- fields and defaults --------------------------------------------------------------------------------------------------

# the row of the specification: the field's default, some values it takes and some it refuses
FIELDS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "scorer": ("snapkv", list(SCORERS), ["h3o", None]),
    "budget_allocation": ("uniform", list(BUDGETS), ["cone"]),
    "granularity": ("head", list(GRANULARITIES), ["token"]),
    "window": (None, [None, 1, 64], [0, -1, 1.5, True]),
    "pool_width": (None, [None, 1, 5], [0, 4, 2.0]),
    "pooling": ("avg", ["avg", "max"], ["sum"]),
    "sinks": (None, [None, 0, 4], [-1, 0.5]),
    "page_align": (None, [None, 1, 16], [0, True]),
    "graph.source_ratio": (0.3, [0, 0.3, 1], [-0.1, 1.1, math.nan]),
    "graph.strength": (1.0, [0, 0.1, 1], [-0.1, 1.1]),
    "graph.rounds": (1, [0, 3, 64], [-1, 65, 1.0]),
    "graph.neighbors": (None, [None, "auto", 1, 9], [0, "all", 1.5]),
    "graph.threshold": (0.9, [0.5, 1], [0.0, -1, 1.1]),  # 0 only where neighbors are counted
    "graph.candidates": (4.0, [None, 1, 2.5], [0.5, math.inf]),
    "graph.similarity": ("post_rope", list(SIMILARITIES), ["rope"]),
    "graph.signal": ("decay", list(SIGNALS), ["boost"]),
    "graph.update": ("product", list(UPDATES), ["sum"]),
}


@pytest.mark.parametrize("field", FIELDS)
def test_field(field: str) -> None:
    default, taken, refused = FIELDS[field]
    name = field.removeprefix("graph.")

    def make(value: Any) -> Policy | Graph:
        return Graph(**{name: value}) if field != name else Policy(9, **{name: value})

    assert getattr(Graph() if field != name else Policy(9), name) == default
    assert [getattr(make(value), name) for value in taken] == taken
    for value in refused:
        with pytest.raises(InvalidInputError, match="must be") as caught:
            make(value)
        assert caught.value.argument == field


def test_field_budget_the_type_decides() -> None:
    assert [Policy(budget).tokens(100) for budget in (1, 7, 1.0, 0.29, 1e-9)] == [1, 7, 100, 29, 1]
    for refused in (0, -1, True, 0.0, 1.5, math.nan, "9", None):
        with pytest.raises(InvalidInputError, match="budget"):
            Policy(refused)


def test_field_defaults_of_the_scorers() -> None:
    windows = {"snapkv": 32, "cake": 32, "tova": 1}
    assert {name: Policy(9, scorer=name).observation_window() for name in SCORERS} == {
        name: windows.get(name, 0) for name in SCORERS
    }
    widths = {"snapkv": 7, "cake": 5}
    assert {name: Policy(9, scorer=name).effective_pool_width for name in SCORERS} == {
        name: widths.get(name, 1) for name in SCORERS
    }
    sinks = {"expected_attention": 4}
    assert {name: Policy(9, scorer=name).effective_sinks for name in SCORERS} == {name: sinks.get(name, 0) for name in SCORERS}


# --- always kept ----------------------------------------------------------------------------------------------------------


def test_always_kept_is_a_union_that_takes_no_part_in_the_graph() -> None:
    keys = torch.tensor([axis(0)] * 4 + [axis(1)] * 4)[None, None]
    scores = torch.tensor([[[0.0, 9.0, 8.0, 7.0, 1.0, 0.5, 0.0, 0.0]]])
    policy = Policy(5, scorer="given", sinks=1, window=2, graph=Graph(**PAPER))
    assert select(keys, scores=scores, policy=policy, pinned=[(6, 8)]).indices[0].tolist() == [[0, 1, 4, 6, 7]]


def test_always_kept_beyond_the_budget_is_pinned_then_sinks_then_the_windows_end() -> None:
    keys, scores = torch.randn(1, 1, 9, 4), torch.rand(1, 1, 9)
    wanted = {1: [4], 2: [0, 4], 3: [0, 1, 4], 4: [0, 1, 4, 8], 5: [0, 1, 4, 7, 8]}
    for budget, tokens in wanted.items():
        policy = Policy(budget, scorer="given", sinks=2, window=3)
        assert select(keys, scores=scores, policy=policy, pinned=[(4, 5)]).indices[0].tolist() == [tokens]
    with pytest.raises(InvalidInputError, match="pinned"):
        select(keys, scores=scores, policy=Policy(1, scorer="given"), pinned=[(4, 6)])


# --- the graph, step by step ----------------------------------------------------------------------------------------------


def test_step_1_negative_scores_are_shifted_by_the_smallest_contender() -> None:
    keys = [axis(0), axis(0), axis(1), axis(2)]
    shifted = [4.0, 3.9, 2.0, 0.0]
    for scores in (shifted, [score - 5.0 for score in shifted]):
        assert kept(scores, keys, 2, graph=PAPER) == [0, 2]  # unshifted, 0 times a negative score would be the best


def test_step_2_candidates_alone_take_part() -> None:
    scores, keys = [5.0, 4.0, 3.0, 2.0], [axis(0), axis(0), axis(1), axis(2)]
    assert kept(scores, keys, 2, graph={**PAPER, "candidates": 1}) == [0, 1]  # C = B: nobody to take a place
    assert kept(scores, keys, 2, graph={**PAPER, "candidates": 1.5}) == [0, 2]
    assert Graph(candidates=1.5).candidate_count(3, 3) == 5
    assert Graph(candidates=1).candidate_count(3, 2) == 3
    assert Graph(**PAPER).candidate_count(3, 3) is None


def test_step_3_sources_are_the_best_of_a_share_of_the_budget() -> None:
    scores, keys = [6.0, 5.0, 4.0, 3.0], [axis(0), axis(1), axis(1), axis(2)]
    assert kept(scores, keys, 3, graph={**PAPER, "source_ratio": 0.3}) == [0, 1, 2]  # K = 1: token 1 lowers nobody
    assert kept(scores, keys, 3, graph={**PAPER, "source_ratio": 0.7}) == [0, 1, 3]  # K = 2
    counts = [(0.3, 10, 9, 3), (0.3, 1, 9, 1), (0.0, 10, 9, 0), (1.0, 10, 4, 4), (0.1, 30, 9, 3)]
    assert [Graph(source_ratio=ratio).source_count(budget, most) for ratio, budget, most, _ in counts] == [
        wanted for *_, wanted in counts
    ]


def test_step_4_edges_are_clamped_below() -> None:
    against = [-value for value in axis(0)]
    assert kept([2.0, 1.0, 1.1], [axis(0), against, axis(1)], 2, graph=PAPER) == [0, 2]  # unclamped, 1.0 would double


def test_step_4_edges_snap_to_one() -> None:
    for cosine, survivor in ((1 - 2**-18, 2), (1 - 2**-14, 1)):
        keys = [axis(0), towards(0, cosine, aside=1), axis(2)]
        assert kept([10.0, 9.0, 1e-9], keys, 2, graph=PAPER) == [0, survivor]


@pytest.mark.parametrize(("graph", "wanted"), [
    ({**PAPER, "neighbors": 1}, [0, 2]),                       # the most similar one alone
    ({**PAPER, "neighbors": 2}, [0, 3]),
    ({**PAPER, "neighbors": None, "threshold": 0.85}, [0, 2]),
    ({**PAPER, "neighbors": None, "threshold": 0.75}, [0, 3]),
    ({**PAPER, "neighbors": "auto"}, [0, 3]),                  # ceil(B / K) = 2
])  # fmt: skip
def test_step_5_neighbors_are_the_most_similar_at_or_above_the_threshold(graph: dict[str, Any], wanted: list[int]) -> None:
    keys = [axis(0), towards(0, 0.9, aside=1), towards(0, 0.8, aside=2), axis(3)]
    assert kept([10.0, 9.0, 8.0, 3.0], keys, 2, graph=graph) == wanted


def test_step_5_auto_is_the_budget_over_the_sources_rounded_up() -> None:
    assert [Graph(neighbors="auto", threshold=0.0).neighbor_count(*sizes) for sizes in ((10, 3), (9, 3), (1, 1))] == [4, 3, 1]


def test_step_5_sources_are_exempt() -> None:
    assert kept([9.0, 8.0, 7.0, 1.0], [axis(0), axis(0), axis(0), axis(1)], 3, graph={**PAPER, "source_ratio": 0.7}) == [
        0,
        1,
        3,
    ]


@pytest.mark.parametrize(("changes", "left"), [
    ({}, 0.4 * 0.2), ({"update": "additive"}, 1 - 0.6 - 0.8), ({"rounds": 3}, (0.4 * 0.2) ** 3), ({"strength": 0.5}, 0.7 * 0.6),
    ({"signal": "enhance"}, 1.6 * 1.8), ({"signal": "enhance", "update": "additive"}, 1 + 0.6 + 0.8), ({"signal": "evict"}, -1.0),
])  # fmt: skip
def test_step_6_updates(changes: dict[str, Any], left: float) -> None:
    """Token 2 has cosines 0.6 and 0.8 to the two sources and score 1; a rival beside it tells on which side of `left` it ended."""
    keys = [axis(0), axis(1), [0.6, 0.8, *axis(0)[2:]], axis(4)]
    graph = {**PAPER, "source_ratio": 0.7, **changes}
    for nudge, wanted in ((-1e-4, [0, 1, 2]), (1e-4, [0, 1, 3])):
        rival = left + nudge
        if rival >= 0:  # a negative rival would shift all scores
            assert kept([9.0, 8.0, 1.0, rival], keys, 3, graph=graph) == wanted
    if left < 0:
        assert kept([9.0, 8.0, 1.0, 0.0], keys, 3, graph=graph) == [0, 1, 3]


def test_step_6_evicted_tokens_come_after_all_others_in_their_order() -> None:
    keys = [axis(0), axis(0), axis(0), axis(0), axis(1)]
    graph = {**PAPER, "signal": "evict", "source_ratio": 0.25, "neighbors": None, "threshold": 0.5}
    scores = [9.0, 2.0, 5.0, 2.0, 0.0]
    assert [kept(scores, keys, budget, graph=graph) for budget in (2, 3, 4)] == [[0, 4], [0, 2, 4], [0, 1, 2, 4]]


def test_step_6_enhanced_scores_end_at_float32s_largest() -> None:
    keys = [axis(0), axis(0), axis(0), axis(1)]
    graph = {**PAPER, "signal": "enhance", "rounds": 64, "neighbors": None, "threshold": 0.5}
    assert kept([3e38, 1e38, 2e38, 1e30], keys, 1, graph=graph) == [1]  # 1 and 2 are equal there: the lower index
    largest = torch.finfo(torch.float32).max
    assert kept([largest, 1e38, 2e38, 1e30], keys, 1, graph=graph) == [0]  # and none is above it


def test_step_7_selection_is_the_always_kept_and_the_best() -> None:
    keys = [axis(place % 8) for place in range(6)]
    scores = [1.0, 5.0, 2.0, 4.0, 3.0, 0.0]
    assert kept(scores, keys, 4, graph=None, sinks=1, window=1) == [0, 1, 3, 5]


# --- sequential -----------------------------------------------------------------------------------------------------------


def test_sequential_every_kept_token_is_a_source_at_once() -> None:
    scores, keys = [4.0, 3.0, 2.9, 1.0], [axis(0), axis(1), axis(1), axis(2)]
    sequential = {"update": "sequential", "candidates": None, "strength": 0.9}
    assert kept(scores, keys, 3, graph=sequential) == [0, 1, 3]
    assert kept(scores, keys, 3, graph={**sequential, "strength": 0.6}) == [0, 1, 2]  # 2.9 * 0.4 > 1


def test_sequential_in_logs_hundreds_of_factors_do_not_underflow() -> None:
    scores = [1.0 + place / 100 for place in range(400)]
    sequential = {"update": "sequential", "candidates": None, "strength": 0.9}
    assert kept(scores, [axis(0)] * 400, 350, graph=sequential) == list(range(50, 400))  # 0.1 ** 350, and still in order


def test_sequential_zero_scores_come_last_by_index() -> None:
    sequential = {"update": "sequential", "candidates": None, "strength": 1.0}
    assert kept([3.0, 3.0, 0.0, 0.0, 1e-30], [axis(0), axis(0), *map(axis, (1, 2, 3))], 3, graph=sequential) == [0, 1, 4]


def test_sequential_always_kept_tokens_are_no_sources() -> None:
    scores, keys = [0.0, 3.0, 2.0, 1.0], [axis(0), axis(0), axis(1), axis(2)]
    assert kept(scores, keys, 2, graph={"update": "sequential", "candidates": None, "strength": 1.0}, sinks=1) == [0, 1]


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_similarity_pre_rope_is_between_keys_before_rotation(interleaved: bool) -> None:
    """Tokens 0 and 1 have one key, rotated to where they stand; four dimensions of eight are rotated."""
    rope = Rope((1.0, 0.1), 4, interleaved)
    plain, positions = torch.tensor([axis(0), axis(0), axis(5)]), torch.tensor([3, 1000, 1001])
    first, second = ([0, 2], [1, 3]) if interleaved else ([0, 1], [2, 3])
    angles = positions[:, None] * torch.tensor(rope.inv_freq, dtype=torch.float64)
    keys = plain.double()
    keys[:, first], keys[:, second] = (
        keys[:, first] * angles.cos() - keys[:, second] * angles.sin(),
        keys[:, second] * angles.cos() + keys[:, first] * angles.sin(),
    )
    scores = torch.tensor([[[3.0, 2.0, 1.0]]])
    given = {"scores": scores, "keys": keys.float()[None, None]}

    def chosen(similarity: str, **inputs: Any) -> list[int]:
        policy = Policy(2, scorer="given", graph=Graph(**{**PAPER, "threshold": 0.9, "similarity": similarity}))
        return select(**given, policy=policy, **inputs).indices[0][0].tolist()

    assert chosen("post_rope") == [0, 1]
    assert chosen("pre_rope", rope=rope, positions=positions[None]) == [0, 2]
    assert chosen("pre_rope", rope=rope) == [0, 1]  # at other places they would be other keys
    assert chosen("pre_rope", similarity_keys=plain[None, None]) == [0, 2]


# --- in every answer ------------------------------------------------------------------------------------------------------


def test_kept_score_ratio_and_changed() -> None:
    keys = torch.tensor([axis(0), axis(0), axis(1), axis(2)])[None, None]
    chosen = select(keys, scores=torch.tensor([[[4.0, 3.0, 2.0, 1.0]]]), policy=Policy(2, scorer="given", graph=Graph(**PAPER)))
    assert chosen.indices[0].tolist() == [[0, 2]]
    assert chosen.layers[0].kept_score_ratio == pytest.approx(6 / 10)
    assert chosen.layers[0].changed == 1
    nothing = select(keys, scores=torch.zeros(1, 1, 4), policy=Policy(2, scorer="given", graph=None))
    assert nothing.layers[0].kept_score_ratio == 1.0


# --- edge cases -----------------------------------------------------------------------------------------------------------

AXES = [axis(place) for place in range(5)]


def test_edge_n_within_the_budget_keeps_all() -> None:
    assert kept([1.0, -math.inf, 3.0], AXES[:3], 3, graph=PAPER) == [0, 1, 2]


def test_edge_n_within_the_window_keeps_all_or_fills_from_the_end() -> None:
    assert kept([1.0, 2.0, 3.0], AXES[:3], 3, graph=PAPER, window=9) == [0, 1, 2]
    assert kept([3.0, 2.0, 1.0], AXES[:3], 2, graph=PAPER, window=9) == [1, 2]


def test_edge_ties_go_to_the_lower_index() -> None:
    assert kept([1.0, 2.0, 2.0, 2.0, 1.0], AXES, 2, graph=None) == [1, 2]
    assert kept([2.0, 1.0, 1.0, 1.0, 0.5], [axis(0)] * 3 + AXES[3:], 3, graph={**PAPER, "neighbors": 1}) == [0, 2, 3]


def test_edge_a_zero_key_is_nobodys_neighbor() -> None:
    for graph in (PAPER, {"threshold": 0.5}, {"update": "sequential"}):
        assert kept([2.0, 1.0, 1.5, 1.2], [[0.0] * 8, axis(0), [0.0] * 8, axis(0)], 3, graph=graph) == [0, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_edge_what_is_not_finite_names_layer_head_and_token(bad: float) -> None:
    keys = torch.randn(2, 3, 9, 4)
    keys[1, 2, 5, 0] = bad
    with pytest.raises(InvalidInputError, match=r"layer 1.*head 2.*token 5"):
        select(keys, policy=Policy(4, scorer="knorm"))
    scores = torch.rand(2, 3, 9)
    scores[1, 2, 5] = bad
    with pytest.raises(InvalidInputError, match=r"layer 1.*head 2.*token 5"):
        select(torch.randn(2, 3, 9, 4), scores=scores, policy=Policy(4, scorer="given"))


def test_edge_minus_infinity_is_padding() -> None:
    scores = [3.0, -math.inf, -math.inf, -math.inf, 1.0]
    assert kept(scores, [axis(0)] * 5, 3, graph={**PAPER, "source_ratio": 1.0}) == [0, 4]  # fewer than the budget
    assert kept(scores, AXES, 3, graph=PAPER, sinks=2) == [0, 1, 4]  # unless always kept


def test_edge_more_neighbors_than_candidates_is_all_of_them() -> None:
    keys = [axis(0), axis(0), axis(0), axis(1)]
    assert kept([4.0, 3.0, 2.0, 1.0], keys, 2, graph={**PAPER, "neighbors": 100}) == [0, 3]


@pytest.mark.parametrize("still", [{"strength": 0.0}, {"source_ratio": 0.0}, {"rounds": 0}], ids=str)
def test_edge_nothing_to_propagate_is_exactly_the_base_method(still: dict[str, Any]) -> None:
    torch.manual_seed(0)
    keys, queries = torch.randn(2, 2, 50, 8), torch.randn(2, 4, 8, 8)
    base, quiet = (
        select(keys, queries=queries, policy=Policy(20, window=8, graph=graph)) for graph in (None, Graph(**{**PAPER, **still}))
    )
    for one, other in zip(base.layers, quiet.layers, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert one.kept_score_ratio == other.kept_score_ratio
        assert other.changed == 0


def test_edge_duplicated_keys_fall_to_exactly_zero_and_go_by_index() -> None:
    key = [0.3, -1.7, 2.2, 0.1, 0.0, 0.0, 0.0, 0.9]
    scaled = [[3.1 * value for value in key], [0.07 * value for value in key]]
    assert kept([9.0, 5.0, 8.0, 1e-30], [key, *scaled, axis(5)], 2, graph=PAPER) == [0, 3]
    assert kept([9.0, 5.0, 8.0, 1e-30], [key, *scaled, axis(5)], 3, graph=PAPER) == [0, 1, 3]


def test_edge_fp16_norms_are_summed_in_more_than_fp16() -> None:
    """300.06 and 300 are one number in fp16, and the square of either is infinite there."""
    keys = torch.tensor([[300.0, 6.0], [300.0, 0.0], [400.0, 400.0]], dtype=torch.float16)[None, None]
    assert select(keys, policy=Policy(1, scorer="knorm", graph=None)).indices[0].tolist() == [[1]]


def test_edge_bf16_keys_cosines_are_never_rounded_to_bf16() -> None:
    """16 / sqrt(257) and 32 / sqrt(1025) are both 1 in bfloat16; the more similar of the two is the one neighbor."""
    keys = torch.tensor([[1.0, 0.0, 0.0], [16.0, 1.0, 0.0], [32.0, 0.0, 1.0], [0.0, 1.0, -1.0]], dtype=torch.bfloat16)[
        None, None
    ]
    policy = Policy(2, scorer="given", graph=Graph(**{**PAPER, "neighbors": 1}))
    assert select(keys, scores=torch.tensor([[[9.0, 7.0, 8.0, 1.0]]]), policy=policy).indices[0].tolist() == [[0, 1]]


@pytest.mark.parametrize(("argument", "make"), [
    ("budget", lambda: Policy(0)),
    ("pool_width", lambda: Policy(4, pool_width=6)),
    ("query_heads", lambda: select(torch.randn(1, 2, 40, 8), queries=torch.randn(1, 3, 32, 8), policy=Policy(4))),
    ("scores", lambda: select(torch.randn(1, 2, 40, 8), scores=torch.randn(1, 2, 39), policy=Policy(4))),
])  # fmt: skip
def test_edge_bad_arguments_are_named(argument: str, make: Any) -> None:
    with pytest.raises(InvalidInputError, match="must be") as caught:
        make()
    assert caught.value.argument == argument
