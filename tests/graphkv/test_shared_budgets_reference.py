"""The reference's budgets that heads and layers share, and its scorers, against numbers worked out by hand."""

import math

import numpy as np
import pytest
from graphkv_testing.adaptive import safe_count
from graphkv_testing.budgets_reference import cake_figures, cake_shares
from graphkv_testing.importance import layer_importance
from graphkv_testing.reference import select_prompt
from graphkv_testing.scored import scored

from graphkv import Graph, Policy

NONE = -math.inf

# --- adaptive_heads --------------------------------------------------------------------------------------------------------


def adaptive(scores, *, alpha, **fields):
    return scored(scores, budget_allocation="adaptive_heads", options={"alpha": alpha}, **fields)[0]


def kept(state):
    return [row.kept for row in state.rows]


def test_adaptive_heads_share_the_layers_budget():
    scores = [[9, 8, 7, 6, 5], [4, 3, 2, 1, 0]]
    assert kept(adaptive(scores, alpha=0.0, budget=2)) == [[0, 1, 2, 3], []]
    assert kept(adaptive(scores, alpha=0.5, budget=2)) == [[0, 1, 2], [0]]
    assert kept(adaptive(scores, alpha=1.0, budget=2)) == [[0, 1], [0, 1]]
    state = adaptive(scores, alpha=0.5, budget=2)
    assert state.kept_score_ratio == (9 + 8 + 7 + 4) / 45
    assert state.changed == 0


def test_adaptive_heads_safe_ones_are_counted_with_the_always_kept():
    assert [safe_count(Policy(10, budget_allocation="adaptive_heads"), 10, always) for always in (0, 1, 2, 5)] == [2, 1, 0, 0]
    # B 3, one sink: floor(0.7 * 3) - 1 = 1 safe; 2 * 3 - 2 sinks - 2 safe = 2 for the best.
    assert kept(adaptive([[0, 9, 8, 7], [0, 3, 2, 1]], alpha=0.7, budget=3, sinks=1)) == [[0, 1, 2, 3], [0, 1]]


def test_adaptive_heads_ties_go_to_the_lower_head_then_the_lower_index():
    assert kept(adaptive([[1, 2, 1], [2, 1, 2]], alpha=0.0, budget=2)) == [[0, 1], [0, 2]]


def test_adaptive_heads_on_updated_scores():
    # Head 0's copies of its best are worth nothing: the places go to head 1, whose keys are all its own.
    keys = np.zeros((1, 2, 4, 4))
    keys[0, 0, :3, 0] = 1
    keys[0, 0, 3, 3] = 1
    keys[0, 1] = np.eye(4)
    scores = np.array([[[9.0, 8, 7, 1], [5, 4, 3, 2]]])
    policy = Policy(
        2, scorer="given", budget_allocation="adaptive_heads", options={"alpha": 0.0}, graph=Graph(source_ratio=0.1)
    )
    (state,) = select_prompt(keys, scores=scores, policy=policy)
    assert kept(state) == [[0], [0, 1, 2]]
    assert state.changed == 2  # without the graph 9, 8, 7 and 5


def test_adaptive_heads_take_candidates_alone():
    # C = B = 1 candidate each: head 1's is taken before head 0's second.
    graph = Graph(candidates=1.0)
    assert kept(adaptive([[9, 8], [1, 0]], alpha=0.0, budget=1, graph=graph)) == [[0], [0]]
    assert kept(adaptive([[9, 8], [1, 0]], alpha=0.0, budget=1)) == [[0, 1], []]


def test_adaptive_heads_sequential_compare_x():
    # Head 0: 8 is kept, its look-alike (cosine 0.6) goes to 6 * (1 - 0.6) = 2.4; head 1 has 4 and 3, strangers.
    # B 1 each: safe 0. x: ln 8, ln 2.4 (at the end); ln 4, ln 3 (at the end).
    keys = np.array([[[[1, 0, 0], [0.6, 0.8, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]]])
    scores = np.array([[[8.0, 6, 0], [4, 3, 0]]])
    graph = Graph(update="sequential", strength=1.0, candidates=None)
    policy = Policy(1, scorer="given", budget_allocation="adaptive_heads", options={"alpha": 0.0}, graph=graph)
    (state,) = select_prompt(keys, scores=scores, policy=policy)
    assert {j: round(math.exp(x), 6) for j, x in state.rows[0].graph.x.items()} == {0: 8.0, 1: 2.4, 2: 0.0}
    assert kept(state) == [[0], [0]]
    assert state.changed == 1  # 8 and 6 without
    (state,) = select_prompt(keys, scores=np.array([[[8.0, 6, 0], [2, 1, 0]]]), policy=policy)
    assert kept(state) == [[0, 1], []]  # a head with more than B_sel takes the rest by their last x


def test_adaptive_heads_where_nothing_competes():
    assert kept(adaptive([[1, NONE], [NONE, NONE]], alpha=0.2, budget=2)) == [[0, 1], [0, 1]]
    state = adaptive([[1, NONE, 2], [NONE, NONE, NONE]], alpha=0.2, budget=2)
    assert kept(state) == [[0, 2], []]  # fewer contenders than places
    assert state.kept_score_ratio == 1.0


# --- the budget "cake" -----------------------------------------------------------------------------------------------------


def test_cake_entropy_and_variance():
    received = np.array([[[0.5, 0.25], [0.1, 0.25]], [[0.5, 0.5], [0.5, 0.5]]])
    entropy, variance = cake_figures(received)
    wanted = -(0.5 * math.log(0.5) + 0.25 * math.log(0.25) * 2 + 0.1 * math.log(0.1)) - 4 * 0.5 * math.log(0.5)
    assert math.isclose(entropy, wanted, rel_tol=1e-8)
    assert math.isclose(variance, 0.4**2 / 2)  # 0.5 and 0.1: away from 0.3 by 0.2 twice, over w - 1 = 1
    assert cake_figures(np.array([[[0.5, 0.5]]]))[1] == 0.0  # one row wavers not


@pytest.mark.parametrize(
    ("weights", "contended", "most", "wanted"),
    [
        pytest.param([1, 1, 2], 4, 99, [3, 3, 6], id="in-proportion"),
        pytest.param([1, 1, 1.5], 4, 99, [4, 3, 5], id="12-in-3.43-3.43-5.14-one-left-to-the-lower-of-two-fractions"),
        pytest.param([0.9, 1, 1.4], 2, 99, [2, 2, 2], id="1.64-1.82-2.55-two-left"),
        pytest.param([8, 1, 1], 4, 6, [6, 3, 3], id="9.6-capped-at-6-and-3.6-shared-again"),
        pytest.param([6, 3, 1], 4, 5, [5, 5, 2], id="the-excess-of-2-goes-in-proportion-and-spills-again"),
        pytest.param([0, 0, 0], 4, 9, [4, 4, 4], id="all-zero-is-uniform"),
        pytest.param([1, 0, 0], 3, 5, [5, 2, 2], id="what-is-left-for-zeros-is-even"),
    ],
)
def test_cake_shares(weights, contended, most, wanted):
    assert cake_shares(weights, contended, most) == wanted
    assert sum(wanted) == len(weights) * contended


def test_cake_budgets_of_a_prompt():
    # Layer 0 looks evenly and steadily at what is before the window: no variance, so nothing but the window is kept there.
    attention = np.zeros((2, 1, 2, 6))
    attention[0, 0, :, :4] = 0.25
    attention[1, 0, 0, :4] = [0.7, 0.1, 0.1, 0.1]
    attention[1, 0, 1, :4] = [0.1, 0.7, 0.1, 0.1]
    policy = Policy(4, budget_allocation="cake", window=2, pool_width=1, graph=None)
    states = select_prompt(np.ones((2, 1, 6, 2)), attention=attention, policy=policy)
    assert [state.budget for state in states] == [2, 6]
    assert [state.rows[0].kept for state in states] == [[4, 5], [0, 1, 2, 3, 4, 5]]


def test_cake_reads_the_last_rows_only():
    rng = np.random.default_rng(0)
    keys, attention = rng.normal(size=(2, 1, 9, 4)), rng.random((2, 1, 9, 9))
    policy = Policy(4, scorer="h2o", budget_allocation="cake", window=3, graph=None)
    own = select_prompt(keys, attention=attention, policy=policy)[0].cake
    assert [received.shape for received in own.received] == [(1, 3, 6)] * 2
    assert math.isclose(own.weights[0], own.entropy[0] ** (1 / 1.6) * own.variance[0] ** (1 / 0.6))


# --- scorers that the row tests do not have --------------------------------------------------------------------------------

ATTENTION = np.array([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], [[0.8, 0.2, 0.0], [0.6, 0.1, 0.3]]])


def test_tova_is_the_last_query_in_every_row():
    own = layer_importance(Policy(1, scorer="tova"), np.ones((2, 3, 2)), window=1, received=ATTENTION)
    assert np.allclose(own.values, [[0.4, 0.2, 0.4]] * 2)


def test_h2o_adds_up_what_every_query_gives():
    full = np.concatenate([np.array([[[1.0, 0, 0]], [[1, 0, 0]]]), ATTENTION], axis=1)
    own = layer_importance(Policy(1, scorer="h2o"), np.ones((1, 3, 2)), window=0, received=full)
    assert np.allclose(own.values, [[(1.7 + 2.4) / 2, (0.8 + 0.3) / 2, (0.5 + 0.3) / 2]])


def test_keydiff_is_minus_the_cosine_with_the_mean_of_the_unit_keys():
    keys = np.array([[[3.0, 0], [0, 0.5], [0, 0]]])  # the mean of (1, 0), (0, 1), 0 points at 45 degrees
    own = layer_importance(Policy(1, scorer="keydiff"), keys, window=0)
    assert np.allclose(own.values, [[-math.sqrt(0.5), -math.sqrt(0.5), 0.0]])


def test_cake_adds_the_variance_over_the_window():
    policy = Policy(1, scorer="cake", window=2, pool_width=1, options={"gamma": 10})
    received = np.array([[[0.5, 0.3, 0, 0], [0.1, 0.3, 0, 0]]])
    own = layer_importance(policy, np.ones((1, 4, 2)), window=2, received=received)
    assert np.allclose(own.values, [[0.3 + 10 * 0.08, 0.3, 0, 0]])


def test_expected_attention_by_hand():
    # d 1: logits k mu + k Sigma k / 2 = 0 and ln 3 (k 1: 0.5 * 2 + ln 3 - 1); value norms 5 and 2.
    policy = Policy(1, scorer="expected_attention")
    own = layer_importance(
        policy,
        np.array([[[0.0], [1.0]]]),
        window=0,
        query_mean=np.array([[math.log(3) - 1]]),
        query_covariance=np.array([[[2.0]]]),
        values=np.array([[[3.0, 4.0], [2.0, 0.0]]]),
    )
    assert np.allclose(own.values, [[0.25 * 5, 0.75 * 2]])
