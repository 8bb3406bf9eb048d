"""The float64 reference itself, against numbers worked out by hand: the paper's figure, the scorers, every edge case."""

import dataclasses
import math

import graphkv_testing.importance as importance
import numpy as np
import pytest
from graphkv_testing.budgets_reference import always_kept, layer_budgets
from graphkv_testing.graph_steps import clamped, cosines, run_graph, unrotated
from graphkv_testing.reference import select_prompt
from graphkv_testing.rule import judge_layer

from graphkv import Graph, Policy, Rope

ONE_SHOT = Graph(neighbors="auto", threshold=0.0, candidates=None)


def given(scores, *, keys=None, budget=2, graph=ONE_SHOT, pinned=(), **fields):
    """One layer under scores [n] or [Hkv, n], keys [n, d] the same for all heads (default: all orthogonal)."""
    scores = np.atleast_2d(np.array(scores, dtype=np.float64))
    keys = np.eye(scores.shape[1]) if keys is None else np.array(keys, dtype=np.float64)
    policy = Policy(budget, scorer="given", graph=graph, **fields)
    return select_prompt(np.array([[keys] * len(scores)]), scores=scores[None], policy=policy, pinned=pinned)[0]


def kept(state):
    return [row.kept for row in state.rows]


# --- the paper's figure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "printed"), [("additive", {3: 0.09, 5: 0.18, 6: -0.07}), ("product", {3: 0.09, 5: 0.18, 6: 0.14})]
)
def test_worked_example(worked_example, update, printed):
    _, state = worked_example(update)
    row = state.rows[0]
    assert [token + 1 for token in row.graph.sources] == [4, 7]
    assert [[token + 1 for token in near] for near in row.graph.neighbours] == [[6, 5], [3, 6]]
    assert {token: round(float(row.graph.updated[token - 1]), 2) for token in printed} == printed
    assert [token + 1 for token in row.kept] == [2, 4, 7]
    assert judge_layer(state, [row.kept]).exact


def test_worked_example_on_the_printed_edges_alone():
    scores, cosine = np.array([0.1, 0.6, 0.3, 1.2, 0.3, 0.7, 1.1]), np.full((7, 7), 0.05)
    for (i, j), edge in {(4, 5): 0.4, (4, 6): 0.5, (7, 3): 0.7, (7, 6): 0.6}.items():
        cosine[i - 1, j - 1] = cosine[j - 1, i - 1] = edge
    state = run_graph(scores, range(7), cosine, dataclasses.replace(ONE_SHOT, source_ratio=0.7), budget=3, contended=3)
    assert np.allclose(state.updated, [0.1, 0.6, 0.09, 1.2, 0.18, 0.14, 1.1])
    assert state.order == [3, 6, 1]


# --- scorers, by hand -----------------------------------------------------------------------------------------------------


def test_pooling_pads_with_zeros_and_always_divides_by_the_width():
    assert importance.pooled(np.array([3.0, 6.0, 9.0]), 3, "avg").tolist() == [3.0, 6.0, 5.0]
    assert importance.pooled(np.array([3.0, 6.0]), 5, "avg").tolist() == [9 / 5, 9 / 5]


def test_max_pooling_pads_with_minus_infinity():
    assert importance.pooled(np.array([-3.0, -6.0, -9.0]), 3, "max").tolist() == [-3.0, -3.0, -6.0]


def test_snapkv_averages_the_window_then_pools_then_averages_the_group():
    # n 5, w 2, two query heads on one KV head; the columns of the window itself must not count.
    attention = np.array([
        [[0.2, 0.4, 0.0, 9.0, 9.0], [0.4, 0.0, 0.6, 9.0, 9.0]],
        [[0.0, 0.0, 0.3, 9.0, 9.0], [0.0, 0.0, 0.9, 9.0, 9.0]],
    ])  # fmt: skip
    # means over the window: [.3 .2 .3] and [0 0 .6]
    assert np.allclose(importance.snapkv(attention, 1, 3, "avg")[0, :3], [(0.5 / 3 + 0) / 2, (0.8 + 0.6) / 6, (0.5 + 0.6) / 6])
    assert np.allclose(importance.snapkv(attention, 1, 3, "max")[0, :3], [0.15, 0.45, 0.45])
    assert np.allclose(importance.snapkv(attention, 2, 1, "avg")[:, :3], [[0.3, 0.2, 0.3], [0.0, 0.0, 0.6]])


def test_attention_is_causal_inside_the_window():
    received = importance.attention_of_window(np.zeros((2, 2, 4)), np.zeros((1, 3, 4)))
    assert received[0].tolist() == [[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]]
    queries, keys = np.array([[[2.0, 0.0]]]), np.array([[[math.log(3) / math.sqrt(2), 5.0], [0.0, 1.0]]])
    assert np.allclose(importance.attention_of_window(queries, keys), [[[0.75, 0.25]]])


def test_query_heads_belong_to_consecutive_kv_heads():
    queries, keys = np.zeros((4, 1, 1)), np.zeros((2, 3, 1))
    queries[2:] = 50.0
    keys[1, 1] = 1.0
    values = importance.snapkv(importance.attention_of_window(queries, keys), 2, 1, "avg")
    assert np.allclose(values[:, :2], [[1 / 3, 1 / 3], [0.0, 1.0]])


def test_knorm_is_minus_the_norm():
    keys = np.array([[[[3.0, 4.0], [0.0, 1.0], [5.0, 12.0]]]])
    state = select_prompt(keys, policy=Policy(1, scorer="knorm", graph=None))[0]
    assert state.rows[0].base.tolist() == [-5.0, -1.0, -13.0]
    assert state.rows[0].shifted.tolist() == [8.0, 12.0, 0.0]
    assert kept(state) == [[1]]
    assert state.kept_score_ratio == 12 / 20


# --- budgets and what is always kept --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "budget", "layers", "fields", "wanted"),
    [
        pytest.param(1000, 100, 4, {}, [195, 132, 69, 6], id="low-5-high-195-step-63-is-floored"),
        pytest.param(150, 100, 2, {}, [100, 100], id="n-below-2P"),
        pytest.param(99, 100, 3, {}, [100, 100, 100], id="n-below-B"),
        pytest.param(1000, 100, 1, {}, [100], id="one-layer"),
        pytest.param(1000, 100, 3, {"window": 100}, [100, 100, 100], id="window-fills-the-budget"),
        pytest.param(90, 60, 3, {"window": 20}, [90, 60, 30], id="high-capped-at-n-minus-A"),
    ],
)
def test_pyramid(n, budget, layers, fields, wanted):
    policy = Policy(budget, scorer="given", budget_allocation="pyramid", graph=None, **fields)
    assert layer_budgets(policy, n, layers) == wanted


def test_page_align_drops_whole_pages():
    assert layer_budgets(Policy(17, scorer="given", page_align=8), 61, 1) == [61 - 8 * 5]
    assert layer_budgets(Policy(17, scorer="given", page_align=8), 24, 1) == [24]
    assert layer_budgets(Policy(17, scorer="given", page_align=8), 16, 1) == [17]


@pytest.mark.parametrize(("ratio", "n", "wanted"), [(0.1, 9, 1), (0.29, 100, 29), (1.0, 7, 7), (0.3, 10, 3), (0.05, 3, 1)])
def test_a_ratio_is_floored_with_a_grain_of_salt(ratio, n, wanted):
    assert layer_budgets(Policy(ratio, scorer="given"), n, 1) == [wanted]


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        (9, [0, 1, 2, 5, 6, 16, 17, 18, 19]),
        (8, [0, 1, 2, 5, 6, 17, 18, 19]),
        (5, [0, 1, 2, 5, 6]),
        (4, [0, 1, 5, 6]),
        (2, [5, 6]),
        (20, list(range(20))),
    ],
)
def test_always_kept_over_the_budget(budget, wanted):
    assert always_kept(20, budget, pinned=[(5, 7)], sinks=3, window=4) == wanted


def test_always_kept_counts_each_token_once():
    assert always_kept(10, 5, pinned=[(0, 2), (1, 3)], sinks=2, window=2) == [0, 1, 2, 8, 9]


def test_pinned_alone_above_the_budget():
    with pytest.raises(ValueError, match="pinned"):
        always_kept(10, 2, pinned=[(0, 3)])


# --- the table of edge cases ------------------------------------------------------------------------------------------------


def test_a_budget_of_n_or_more_keeps_all_even_padding():
    for budget in (4, 5):
        state = given([1.0, -math.inf, 2.0, -math.inf], budget=budget)
        assert kept(state) == [[0, 1, 2, 3]]
        assert (state.kept_score_ratio, state.changed) == (1.0, 0)


def test_a_window_of_n_or_more():
    assert kept(given([3.0, 2.0, 1.0], budget=2, window=5)) == [[1, 2]]
    assert kept(given([3.0, 2.0, 1.0], budget=3, window=5)) == [[0, 1, 2]]
    assert kept(given([3.0, 2.0, 1.0], budget=2, window=5, sinks=1)) == [[0, 2]]


def test_ties_go_to_the_lower_index():
    for graph in (None, ONE_SHOT, Graph(update="sequential")):
        assert kept(given([1.0, 2.0, 1.0, 2.0, 1.0], budget=3, graph=graph)) == [[0, 1, 3]]


def test_a_zero_key_is_nobodys_neighbour():
    keys = [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    state = given([4.0, 3.0, 2.0, 1.0], keys=keys, budget=2)
    assert state.rows[0].graph.neighbours == [[2]]  # neither the zero key nor the orthogonal one
    assert cosines(np.zeros((2, 3)))[0].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_minus_infinity_is_padding():
    state = given([[5.0, -math.inf, 3.0, -math.inf], [-math.inf, -math.inf, 1.0, -math.inf]], budget=2)
    assert kept(state) == [[0, 2], [2]]
    state = given([5.0, -math.inf, 3.0, -math.inf], budget=3, pinned=[(1, 2)])
    assert kept(state) == [[0, 1, 2]]
    assert given([-math.inf] * 3, budget=2).kept_score_ratio == 1.0


def test_more_neighbours_than_candidates_is_all_of_them():
    keys = np.ones((5, 2)) + np.eye(5, 2)
    state = given([5.0, 4.0, 3.0, 2.0, 1.0], keys=keys, budget=2, graph=dataclasses.replace(ONE_SHOT, neighbors=100))
    assert sorted(state.rows[0].graph.neighbours[0]) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "still", [Graph(strength=0.0), Graph(source_ratio=0.0), Graph(rounds=0), Graph(update="sequential", strength=0.0)]
)
def test_nothing_to_propagate_is_the_base_method(still):
    state = given([1.0, 3.0, 2.0], keys=np.ones((3, 2)), graph=still)
    assert state.rows[0].graph is None
    assert kept(state) == [[1, 2]]


def test_evict_ignores_strength():
    graph = Graph(strength=0.0, signal="evict")
    assert kept(given([3.0, 2.0, 1.0, 0.5], keys=[[1, 0], [1, 0], [0, 1], [1, 0]], budget=2, graph=graph)) == [[0, 2]]


def test_duplicates_of_a_source_become_exactly_zero_and_go_by_index():
    rng = np.random.default_rng(0)
    key = rng.normal(size=24)
    state = given([9.0, 1.0, 5.0, 3.0], keys=[key, key * 1.7, key / 3, key * 2], budget=2, graph=Graph())
    assert state.rows[0].graph.updated[1:].tolist() == [0.0, 0.0, 0.0]
    assert kept(state) == [[0, 1]]


def test_evicted_tokens_are_ranked_by_score_below_all_others():
    keys = [[1, 0], [1, 0], [0, 1], [1, 0], [0, 1]]
    state = given([9.0, 2.0, 0.5, 3.0, -4.0], keys=keys, budget=4, graph=Graph(signal="evict", source_ratio=0.25))
    graph = state.rows[0].graph
    assert graph.evicted == {1, 3}
    assert (graph.updated[3], graph.updated[1]) == (-1.0, -2.0)
    assert kept(state) == [[0, 2, 3, 4]]
    assert state.changed == 1


def test_the_shift_is_by_the_smallest_contender():
    # Token 0 is smaller still, but always kept; candidates 1 would leave token 1 out, but it is a contender.
    state = given([-9.0, -5.0, -2.0, -1.0], budget=2, sinks=1, graph=Graph(candidates=1.0))
    assert state.rows[0].shifted[1:].tolist() == [0.0, 3.0, 4.0]
    assert given([1.0, 2.0, 3.0]).rows[0].shifted.tolist() == [1.0, 2.0, 3.0]


def test_candidates_and_sources_counts():
    scores = np.arange(20.0, 0.0, -1.0)
    graph = given(scores, budget=5, window=2, graph=Graph(candidates=1.5, source_ratio=0.5)).rows[0].graph
    assert graph.candidates == list(range(8))  # max(B_sel 3, ceil(1.5 * 5))
    assert graph.sources == [0, 1]  # floor(0.5 * 5)
    graph = given(scores, budget=5, window=2, graph=Graph(source_ratio=1.0)).rows[0].graph
    assert graph.sources == [0, 1, 2]  # never more than B_sel


def test_edges_are_clamped_and_snapped():
    edges = clamped(np.array([[-0.3, 0.0, 0.5, 1 - 2.0**-16, 1 - 2.0**-15, 1.0000001]]))
    assert edges.tolist() == [[0.0, 0.0, 0.5, 1.0, 1 - 2.0**-15, 1.0]]


def test_rounds_are_powers_and_enhance_saturates():
    keys = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]
    graph = dataclasses.replace(ONE_SHOT, rounds=3, strength=0.5)
    assert np.isclose(given([3.0, 2.0, 1.0], keys=keys, graph=graph).rows[0].graph.updated[1], 2 * 0.7**3)
    graph = dataclasses.replace(graph, signal="enhance", rounds=64, strength=1.0)
    updated = given([2e30, 1e30, 0.0], keys=np.ones((3, 1)), graph=graph).rows[0].graph.updated
    assert updated.tolist() == [2e30, float(np.finfo(np.float32).max), 0.0]


def test_sequential_by_hand():
    # Two look-alikes (cosine 0.6) and a stranger: after the best is kept the second is worth 4 * (1 - 0.5 * 0.6).
    keys = [[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    graph = Graph(update="sequential", strength=0.5, candidates=None)
    row = given([5.0, 4.0, 3.0, 0.0], keys=keys, budget=2, graph=graph).rows[0]
    assert row.graph.order == [0, 2]
    assert np.allclose(row.graph.updated, [5.0, 2.8, 3.0, 0.0])
    assert given([5.0, 4.0, 3.0, 0.0], keys=keys, budget=4, window=1, graph=graph).rows[0].kept == [0, 1, 2, 3]


def test_sequential_zeros_come_last_by_index():
    keys = np.ones((4, 3))
    row = given([1.0, 2.0, 3.0, 4.0], keys=keys, budget=3, graph=Graph(update="sequential", strength=1.0)).rows[0]
    assert row.graph.order == [3, 0, 1]


@pytest.mark.parametrize("interleaved", [False, True])
def test_unrotating_gives_back_the_keys_before_rotation(interleaved):
    rope = Rope((1.0, 0.1), 4, interleaved=interleaved)
    key = np.array([[0.0, 1.0, 0.0, 0.0, 7.0], [1.0, 0.0, 0.0, 0.0, 7.0]])  # one per pair layout; the fifth passes
    partner = np.array([[0.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
    if interleaved:  # pairs (0, 1), (2, 3): component 1 is the second of pair 0
        turned = np.array([-math.sin(3.0), math.cos(3.0), 0.0, 0.0, 7.0])
    else:  # pairs (0, 2), (1, 3): component 1 is the first of pair 1
        turned = math.cos(0.3) * key[0] + math.sin(0.3) * partner[0]
        turned[4] = 7.0
    assert np.allclose(unrotated(turned[None], np.array([3.0]), rope)[0], key[0])
