"""What the reference's answers hold on request, against numbers worked out by hand."""

import math

import graphkv_testing.outputs_reference as outputs
import numpy as np
from graphkv_testing.scored import scored

from graphkv import Graph

NONE = -math.inf


def test_outputs_of_a_row():
    keys = [[1, 0, 0], [0.6, 0.8, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0]]
    graph = Graph(neighbors=3, threshold=0.5, candidates=1.5, strength=0.5, rounds=2, source_ratio=0.1)
    state = scored([9, 8, NONE, 2, 5], keys=keys, budget=2, graph=graph, pinned=[(4, 5)])[0]
    # B_sel 1, C 3: candidates 0, 1, 3; source 0 lowers 1 by (1 - 0.3) twice and its copy 3 by 0.5 twice.
    assert np.allclose(outputs.updated_scores(state), [[9, 8 * 0.49, NONE, 0.5, math.inf]])
    assert np.allclose(outputs.decay_factors(state), [[1, 0.49, 1, 0.25, 1]])
    own = outputs.kept_tokens(state)
    assert own == [[0, 4]]
    assert outputs.keep_mask(own, 5).tolist() == [[True, False, False, False, True]]
    assert outputs.dropped_ranges(own, 5) == [[0, 1, 4]]
    assert outputs.moves(own) == [[0, 4, 1]]


def test_outputs_beside_the_candidates():
    # The smallest, -6, is subtracted for all; token 3 is no candidate and keeps its base score, shifted.
    state = scored([-1, -2, -6, -3], budget=1, graph=Graph(candidates=2.0, source_ratio=0.1))[0]
    assert outputs.updated_scores(state).tolist() == [[5.0, 4.0, 0.0, 3.0]]
    state = scored([-1, -2, -6, -3], budget=1)[0]
    assert outputs.updated_scores(state).tolist() == [[-1.0, -2.0, -6.0, -3.0]]  # where nothing propagates: as they are


def test_outputs_of_sequential():
    keys = [[1, 0, 0], [0.6, 0.8, 0], [0, 0, 1]]
    graph = Graph(update="sequential", strength=0.5, candidates=None)
    state = scored([[5, 4, 3], [1, 9, 3]], keys=keys, budget=2, graph=graph)[0]
    assert outputs.choice_order(state).tolist() == [[0, 2], [1, 2]]
    assert np.allclose(outputs.updated_scores(state), [[5, 2.8, 3], [0.7, 9, 3]])
    assert np.allclose(outputs.decay_factors(state), [[1, 0.7, 1], [0.7, 1, 1]])
    state = scored([[5, NONE, NONE], [1, 9, 3]], budget=2, graph=graph)[0]
    assert outputs.choice_order(state).tolist() == [[0, -1], [1, 2]]
    assert outputs.choice_order(scored([[5, 4, 3]], budget=3, graph=graph)[0]).shape == (1, 0)
    still = Graph(update="sequential", strength=0.0)
    assert outputs.choice_order(scored([3, 5, 4], budget=2, graph=still)[0]).tolist() == [[1, 2]]


def test_outputs_of_signals():
    keys = [[1, 0], [0.6, 0.8], [1, 0]]
    for signal, scores, factors in (
        ("enhance", [9, 8 * 1.6, 2 * 2], [1, 1.6, 2]),
        ("evict", [9, -1, -2], [1, 0, 0]),
    ):
        graph = Graph(signal=signal, threshold=0.5, source_ratio=0.1)
        state = scored([9, 8, 2], keys=keys, budget=1, graph=graph)[0]
        assert np.allclose(outputs.updated_scores(state), [scores])
        assert np.allclose(outputs.decay_factors(state), [factors])
    graph = Graph(update="additive", threshold=0.5, source_ratio=1.0)
    state = scored([9, 7, 2], keys=[[1, 0], [0, 1], [0.6, 0.8]], budget=2, graph=graph)[0]
    assert np.allclose(outputs.decay_factors(state), [[1, 1, 1 - 0.6 - 0.8]])
    assert np.allclose(outputs.updated_scores(state), [[9, 7, 2 * -0.4]])


def test_outputs_of_a_shared_answer_have_one_row():
    (state,) = scored([[4, 1, 3, NONE, 2], [0, 5, 1, 8, 2]], granularity="layer", sinks=1)
    assert outputs.updated_scores(state).tolist() == [[math.inf, 3.0, 2.0, NONE, 2.0]]
    own = outputs.kept_tokens(state)
    assert own == [[0, 1]]
    assert outputs.dropped_ranges(own, 5) == [[0, 2, 5]]
    assert outputs.moves(own) == []


def test_outputs_of_pages_are_of_tokens():
    state = scored([[5, 0, 2, 2, 3, 3, 1], [0, 0, 9, 9, 3, 3, 1]], budget=5, page_size=2)[0]
    own = outputs.kept_tokens(state)
    assert own == [[4, 5, 6], [2, 3, 6]]  # 5 // 2 pages, the last partial one among them; 3 + 3 before 5 + 0 and 2 + 2
    assert outputs.updated_scores(state).tolist() == [[5, 0, 2, 2, 3, 3, 1], [0, 0, 9, 9, 3, 3, 1]]
    assert outputs.dropped_ranges(own, 7) == [[0, 0, 4], [1, 0, 2], [1, 4, 6]]
    assert outputs.moves(own) == [[0, 4, 0], [0, 5, 1], [0, 6, 2], [1, 2, 0], [1, 3, 1], [1, 6, 2]]


def test_nothing_competes():
    state = scored([[4, NONE], [0, 5]], granularity="layer")[0]
    assert outputs.updated_scores(state).tolist() == [[math.inf, math.inf]]
    assert outputs.moves(outputs.kept_tokens(state)) == outputs.dropped_ranges(outputs.kept_tokens(state), 2) == []
