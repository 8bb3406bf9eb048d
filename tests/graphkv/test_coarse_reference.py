"""The reference's coarser answers against numbers worked out by hand, row by row of the text: layer, model, pages, votes."""

import math

import numpy as np
import pytest
from graphkv_testing.budgets_reference import paging
from graphkv_testing.scored import scored

from graphkv import Graph, Policy

ONE_SHOT = Graph(neighbors="auto", threshold=0.0, candidates=None)
NONE = -math.inf


def units(state):
    return [shared.units for shared in state.shared]


# --- granularity layer --------------------------------------------------------------------------------------------------


def test_layer_keeps_one_set_by_the_mean_of_its_heads():
    (state,) = scored([[4, 1, 3, 2], [0, 5, 1, 2]], granularity="layer")
    assert state.shared[0].values.tolist() == [2.0, 3.0, 2.0, 2.0]  # three tie for the second place: the lowest has it
    assert units(state) == [[0, 1]]
    assert state.kept_score_ratio == (4 + 1 + 0 + 5) / (10 + 8)
    assert state.changed == 0


def test_layer_combines_by_the_largest_on_request():
    (state,) = scored([[4, 1, 3, 2], [0, 1, 1, 6]], granularity="layer", combine="max")
    assert state.shared[0].values.tolist() == [4.0, 1.0, 3.0, 6.0]
    assert units(state) == [[0, 3]]


def test_layer_combines_updated_scores():
    # Token 1 looks like the best one, 0: cosine 0.6. Each head halves it by 1 - 0.5 * 0.6 = 0.7: (0.7 * 4 + 0.7 * 2) / 2.
    keys = [[1, 0, 0], [0.6, 0.8, 0], [0, 0, 1]]
    graph = Graph(neighbors="auto", threshold=0.1, candidates=None, strength=0.5)
    (state,) = scored([[6, 4, 3], [6, 2, 2]], keys=keys, granularity="layer", graph=graph)
    assert np.allclose(state.shared[0].values, [6, 2.1, 2.5])
    assert units(state) == [[0, 2]]
    assert state.changed == 2  # token 2 instead of 1 (3 against 2.5), in both heads
    assert np.isclose(state.kept_score_ratio, (6 + 3 + 6 + 2) / (13 + 10))


def test_a_token_outside_a_rows_candidates_counts_there_with_its_base_score():
    # B 2, so C = 2: head 0 looks at tokens 0 and 1 alone, and token 2, though a copy of its source, stays at 4 there.
    keys = [[1, 0], [1, 0], [1, 0], [0, 1]]
    graph = Graph(candidates=1.0, threshold=0.5)
    (state,) = scored([[9, 8, 4, 0], [0, 0, 4, 9]], keys=keys, granularity="layer", graph=graph)
    assert state.shared[0].members[0][1].graph.candidates == [0, 1]
    assert state.shared[0].members[1][1].graph.candidates == [3, 2]
    assert state.shared[0].values.tolist() == [4.5, 0.0, 4.0, 4.5]
    assert units(state) == [[0, 3]]


def test_the_layers_selection_is_from_all_contenders():
    # Token 2 is the second of neither head, so nobody's candidate, and yet the best on average.
    (state,) = scored([[9, 0, 8], [0, 9, 8]], budget=1, granularity="layer", graph=Graph(candidates=1.0))
    assert [row.candidates for _, row in state.shared[0].members] == [[0], [1]]
    assert units(state) == [[2]]
    assert state.changed == 0


def test_rows_are_shifted_one_by_one_where_the_graph_propagates_and_only_there():
    scores = [[-8, -2, -5], [-1, -2, -3]]
    (state,) = scored(scores, granularity="layer", graph=ONE_SHOT)
    assert state.shared[0].values.tolist() == [(0 + 2) / 2, (6 + 1) / 2, (3 + 0) / 2]
    (state,) = scored(scores, granularity="layer")
    assert state.shared[0].values.tolist() == [-4.5, -2.0, -4.0]
    assert state.kept_score_ratio == (6 + 1 + 3 + 0) / (9 + 3)  # shifted in any case


def test_minus_infinity_in_any_row_is_minus_infinity():
    (state,) = scored([[9, 1, NONE, 2], [NONE, 1, 9, 2]], budget=3, granularity="layer")
    assert units(state) == [[1, 3]]  # fewer than B
    (state,) = scored([[9, 1, NONE, 2], [NONE, 1, 9, 2]], budget=3, granularity="layer", pinned=[(0, 1)])
    assert units(state) == [[0, 1, 3]]


def test_layer_keeps_all_within_the_budget():
    (state,) = scored([[1, NONE, 2], [3, 1, NONE]], budget=3, granularity="layer", graph=ONE_SHOT)
    assert (units(state), state.kept_score_ratio, state.changed) == ([[0, 1, 2]], 1.0, 0)


# --- granularity model ----------------------------------------------------------------------------------------------------


def test_model_keeps_one_set_for_all_layers():
    scores = [[[4, 1, 3, 0], [0, 5, 1, 0]], [[0, 0, 6, 9], [0, 0, 6, 1]]]
    (state,) = scored(scores, budget=1, granularity="model")
    assert state.shared[0].values.tolist() == [1.0, 1.5, 4.0, 2.5]
    assert (state.layer, units(state)) == (0, [[2]])
    assert state.kept_score_ratio == (3 + 1 + 6 + 6) / (8 + 6 + 15 + 7)
    (state,) = scored(scores, budget=1, granularity="model", combine="max")
    assert units(state) == [[3]]


def test_model_counts_what_the_graph_changed_in_every_row():
    keys = [[1, 0], [1, 0], [0, 1]]
    (state,) = scored([[[9, 5, 4]], [[9, 5, 4]], [[9, 5, 4]]], keys=keys, granularity="model", graph=Graph())
    assert units(state) == [[0, 2]]
    assert state.changed == 3


# --- pages ---------------------------------------------------------------------------------------------------------------


def test_pages_compete_by_the_mean_of_their_tokens():
    # Pages of 2: (5 + 0) / 2, (2 + 2) / 2, (3 + 3) / 2; B 5 is two pages.
    (state,) = scored([5, 0, 2, 2, 3, 3], budget=5, page_size=2)
    assert units(state) == [[0, 2]]
    assert state.shared[0].kept == [0, 1, 4, 5]
    assert state.kept_score_ratio == 11 / 15
    (state,) = scored([5, 0, 4, 4, 3, 3], budget=3, page_size=2, combine="max")
    assert units(state) == [[0]]


def test_the_last_partial_page_is_kept_and_counts():
    (state,) = scored([5, 5, 4, 4, 0], budget=4, page_size=2)
    assert units(state) == [[0, 2]]


def test_pages_with_always_kept_tokens_are_kept_and_their_other_tokens_contend():
    # Page 1 holds a pinned token; the copies in it and in page 2 of the source 1 are decayed, all in one graph.
    keys = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1]]
    (state,) = scored(
        [1, 9, 0, 8, 7, 7, 3, 3], keys=keys, budget=4, page_size=2, pinned=[(2, 3)], graph=Graph(source_ratio=0.1)
    )
    assert state.shared[0].values.tolist()[3:6] == [0.0, 0.0, 0.0]
    assert state.paging.always == [1]
    assert units(state) == [[0, 1]]
    assert state.shared[0].kept == [0, 1, 2, 3]
    assert state.kept_score_ratio == (1 + 9 + 8) / 38  # contenders in kept pages; the pinned one is none
    assert state.changed == 2  # 0 and 1; the base method keeps the pages of 8 and of 7 + 7


def test_a_page_larger_than_the_budget_is_one_page():
    (state,) = scored([1, 1, 1, 5, 0, 0], budget=2, page_size=3)
    assert units(state) == [[1]]


def test_a_page_without_contenders_is_not_kept():
    (state,) = scored([NONE, NONE, 1, NONE, NONE, NONE], budget=4, page_size=2)
    assert units(state) == [[1]]
    (state,) = scored([NONE, 8, 5, 5, 6, NONE], budget=4, page_size=2)
    assert units(state) == [[0, 2]]  # the mean is over the contenders: 8, 5, 6


def test_pages_of_a_layer_combine_heads_first():
    (state,) = scored([[4, 0, 0, 1], [0, 3, 2, 1]], budget=2, page_size=2, granularity="layer", combine="max")
    assert state.shared[0].values.tolist() == [4, 3, 2, 1]
    assert units(state) == [[0]]
    state = scored([[4, 0, 0, 1], [0, 3, 2, 9]], budget=2, page_size=2)[0]
    assert units(state) == [[0], [1]]


@pytest.mark.parametrize(
    ("budget", "fields", "pinned", "wanted"),
    [
        pytest.param(8, {"sinks": 1, "window": 3}, [(9, 10)], [0, 4, 5], id="each-page-once"),
        pytest.param(6, {"sinks": 3, "window": 3}, [(4, 6)], [0, 1, 2], id="pinned-then-sinks"),
        pytest.param(6, {"sinks": 1, "window": 3}, [(4, 6)], [0, 2, 5], id="then-the-window-from-the-end"),
        pytest.param(2, {"window": 3}, [], [5], id="one-page"),
        pytest.param(4, {"sinks": 3}, [], [0, 1], id="the-last-partial-page-last"),
        pytest.param(11, {}, [], [0, 1, 2, 3, 4, 5], id="n-is-B"),
    ],
)
def test_always_kept_pages(budget, fields, pinned, wanted):
    policy = Policy(budget, scorer="given", page_size=2, **fields)
    assert paging(policy, 11, budget, pinned=pinned, window=fields.get("window", 0)).always == wanted


def test_pinned_pages_above_the_budget():
    policy = Policy(4, scorer="given", page_size=4)
    with pytest.raises(ValueError, match="pinned"):
        paging(policy, 11, 4, pinned=[(3, 5)])


# --- votes ---------------------------------------------------------------------------------------------------------------

SEQUENTIAL = Graph(update="sequential", strength=1.0, candidates=1.5)


def test_vote_of_the_heads():
    # Keys 0 and 1 are copies: whoever keeps one drops the other. B 2, C 3.
    keys = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    scores = [[9, 8, 7, 0, 0], [6, 8, 0, 7, 0], [0, 0, 1, 2, 3]]
    (state,) = scored(scores, keys=keys, granularity="layer", graph=SEQUENTIAL)
    assert [row.graph.order for _, row in state.shared[0].members] == [[0, 2], [1, 3], [4, 3]]
    assert state.shared[0].values.tolist() == [1.0, 1.0, 1.0, 2.0, 1.0]
    assert state.shared[0].ties.tolist() == [15.0, 16.0, 8.0, 9.0, 3.0]  # base scores where the token is a candidate
    assert units(state) == [[1, 3]]
    assert state.kept_score_ratio == (8 + 8 + 7 + 2) / (24 + 21 + 6)
    # Without the graph: {0, 1}, {1, 3}, {4, 3} of the same candidates; 1 and 3 have two votes.
    assert state.changed == 0


def test_a_vote_of_no_row_still_ranks_above_what_is_nobodys_candidate():
    graph = Graph(update="sequential", strength=0.5, candidates=2.0)
    (state,) = scored([[9, 5, 1, 0], [9, 5, 0, 0]], budget=1, granularity="layer", graph=graph)
    assert state.shared[0].values.tolist() == [2.0, 0.0, NONE, NONE]
    assert units(state) == [[0]]


def test_ties_of_the_vote_are_of_shifted_scores_in_rows_whose_candidate_it_is():
    graph = Graph(update="sequential", strength=0.5, candidates=1.0)
    (state,) = scored([[-1, -9, -4], [-7, -5, -9]], budget=1, granularity="layer", graph=graph)
    assert state.shared[0].values.tolist() == [1.0, 1.0, NONE]
    assert state.shared[0].ties.tolist() == [8.0, 4.0, 0.0]
    assert units(state) == [[0]]
    assert state.kept_score_ratio == 8 / (8 + 0 + 5 + 2 + 4 + 0)


def test_minus_infinity_in_a_row_is_no_vote_there():
    graph = Graph(update="sequential", strength=0.5, candidates=None)
    (state,) = scored([[NONE, 2, 1], [5, 4, 3], [5, 3, 4]], budget=1, granularity="layer", graph=graph)
    assert state.shared[0].values.tolist() == [2.0, 1.0, 0.0]
    assert units(state) == [[0]]


def test_without_strength_nobody_votes():
    graph = Graph(update="sequential", strength=0.0, candidates=1.0)
    (state,) = scored([[9, 0, 8], [0, 9, 8]], budget=1, granularity="layer", graph=graph)
    assert units(state) == [[2]]  # the mean, as without a graph


def test_the_rows_of_all_layers_vote():
    graph = Graph(update="sequential", strength=0.5, candidates=2.0)
    (state,) = scored([[[9, 8, 0]], [[0, 5, 4]], [[7, 1, 0]]], budget=1, granularity="model", graph=graph)
    assert state.shared[0].values.tolist() == [2.0, 1.0, 0.0]
    assert units(state) == [[0]]


def test_pages_with_votes_count_their_tokens_kept():
    # Copies again; a single head keeps 0, 2 and 5 of its candidates 0, 1, 2, 5: pages of 2 have 1, 1, 1 of them.
    keys = np.eye(6)
    keys[1] = keys[0]
    graph = Graph(update="sequential", strength=1.0, candidates=1.3)
    (state,) = scored([9, 8, 3, 0, 0, 4], keys=keys, budget=3, page_size=2, graph=graph)
    assert state.shared[0].members[0][1].graph.order == [0, 5, 2]
    assert units(state) == [[0]]  # 9 + 8 before 3 and 4
    assert state.kept_score_ratio == 17 / 24
    (state,) = scored(
        [[9, 8, 3, 0, 0, 4], [0, 0, 5, 5, 0, 0]], keys=keys, budget=3, page_size=2, granularity="layer", graph=graph
    )
    # Head 1 keeps 2, 3 and 0 (all are 0 but these; index), so page 1 has three votes, page 0 two.
    assert units(state) == [[1]]
