"""One test for each rule of budgets that the heads of a layer share ("adaptive_heads") or the layers of a prompt ("cake"), by hand.

docs/algorithm.md, "Budgets". The whole numbers of "cake" are in test_budgets.py; here are the weights they follow.
"""

import math
from typing import Any

import pytest
import torch
from graphkv_testing.by_hand import PAPER, SEQUENTIAL, axis, chosen, listed
from graphkv_testing.every_scorer import DIM, GROUP, HEADS, LAYERS, policy_of, prompt_for

from graphkv import Graph, InvalidInputError, Policy, select
from graphkv.terms.catalogue import SCORERS

NONE = -math.inf
TWINS = [axis(0), axis(0), axis(1), axis(2)]  # tokens 0 and 1 are one


def heads(scores: list[list[float]], budget: int, *, alpha: float = 0.0, **others: Any) -> list[list[int]]:
    """What each head keeps where they share the layer's budget."""
    return listed(sharing(scores, budget, alpha=alpha, **others).indices)


def sharing(scores: list[list[float]], budget: int, *, alpha: float = 0.0, **others: Any) -> Any:
    return chosen(scores, budget, budget_allocation="adaptive_heads", options={"alpha": alpha}, **others).layers[0]


# --- adaptive_heads -------------------------------------------------------------------------------------------------------

HIGH, LOW = [10.0, 9, 8, 7, 6, 5], [5.0, 4, 3, 2, 1, 0.5]


@pytest.mark.parametrize(("budget", "alpha", "sizes"), [
    (4, 0.5, (6, 2)),   # two of each head are safe, the other four go to the best
    (4, 0.75, (5, 3)), (4, 1.0, (4, 4)), (4, 0.0, (6, 2)), (4, 0.74, (6, 2)),
    (3, 0.0, (6, 0)),   # 10, 9, 8, 7, 6 and one of two 5s: the lower head's
    (3, 0.34, (5, 1)), (1, 1.0, (1, 1)), (1, 0.99, (2, 0)),
    (6, 0.0, (6, 6)),   # n within the budget
    (5, 0.6, (6, 4)), (5, 0.9, (6, 4)), (5, 1.0, (5, 5)),
])  # fmt: skip
def test_adaptive_heads_some_of_each_head_are_safe_and_the_rest_go_to_the_best(
    budget: int, alpha: float, sizes: tuple[int, int]
) -> None:
    assert heads([HIGH, LOW], budget, alpha=alpha) == [list(range(size)) for size in sizes]
    assert heads([LOW, HIGH], budget, alpha=alpha) == [list(range(size)) for size in sizes[::-1]] or (budget, alpha) == (3, 0.0)


def test_adaptive_heads_ties_go_to_the_lower_head_then_the_lower_token() -> None:
    assert heads([[1.0, 1, 1], [2, 1, 1]], 1) == [[0], [0]]
    assert heads([LOW, HIGH], 3) == [[0], [0, 1, 2, 3, 4]]
    assert heads([[1.0, 1, 1], [1, 1, 1]], 2) == [[0, 1, 2], [0]]


def test_adaptive_heads_alpha_is_a_fifth_by_default() -> None:
    policy = Policy(10, budget_allocation="adaptive_heads")
    assert policy.option("alpha") == 0.2
    scores = torch.tensor([[[30.0 - token for token in range(20)], [0.0] * 20]])
    policy = Policy(10, scorer="given", budget_allocation="adaptive_heads", graph=None)
    answer = select(torch.eye(20).expand(1, 2, -1, -1), scores=scores, policy=policy)
    assert listed(answer.indices[0]) == [list(range(18)), [0, 1]]


def test_adaptive_heads_always_kept_tokens_are_of_the_safe_ones() -> None:
    """A = 2 of B = 4 in each head: half of B is safe already, all of it leaves two safe."""
    rows = [[0.0, *HIGH, 0], [0.0, *LOW, 0]]
    assert heads(rows, 4, alpha=0.5, sinks=1, window=1) == [[0, 1, 2, 3, 4, 7], [0, 7]]
    assert heads(rows, 4, alpha=0.75, sinks=1, window=1) == [[0, 1, 2, 3, 7], [0, 1, 7]]
    assert heads(rows, 4, alpha=1.0, sinks=1, window=1) == [[0, 1, 2, 7], [0, 1, 2, 7]]
    assert heads(rows, 2, sinks=1, window=1) == [[0, 7], [0, 7]]  # nothing is left to share


def test_adaptive_heads_the_answer_is_ragged_unless_the_heads_are_equal() -> None:
    ragged = sharing([HIGH, LOW], 4).indices
    assert isinstance(ragged, list)
    assert [row.dtype for row in ragged] == [torch.int32] * 2
    assert sharing([HIGH, LOW], 4, alpha=1.0).indices.shape == (2, 4)


def test_adaptive_heads_each_layer_shares_its_own() -> None:
    answer = chosen([[HIGH, LOW], [LOW, HIGH]], 4, budget_allocation="adaptive_heads", options={"alpha": 0.5})
    assert [[len(row) for row in layer.indices] for layer in answer] == [[6, 2], [2, 6]]


def test_adaptive_heads_padding_is_never_kept() -> None:
    assert heads([[NONE, NONE, NONE, 1.0], [9, 8, 7, 6]], 2) == [[], [0, 1, 2, 3]]
    assert heads([[NONE, NONE, NONE, 1.0], [9, 8, NONE, 6]], 3) == [[3], [0, 1, 3]]  # fewer than 2 x 3 compete
    assert heads([[NONE, NONE, NONE, 1.0], [9, 8, 7, 6]], 2, alpha=1.0) == [[3], [0, 1, 2]]  # what is safe and absent is shared


def test_adaptive_heads_go_by_updated_scores() -> None:
    """4, 0, 2, 1 and 1, 2.5, 3, 3.5; without the graph token 1 of the first head would be kept, not of the second."""
    layer = sharing([[4.0, 3, 2, 1], [1, 2.5, 3, 3.5]], 2, keys=TWINS, graph=PAPER)
    assert listed(layer.indices) == [[0], [1, 2, 3]]
    assert layer.changed == 1
    assert layer.kept_score_ratio == pytest.approx(13 / 20)
    assert heads([[4.0, 3, 2, 1], [1, 2.5, 3, 3.5]], 2, keys=TWINS) == [[0, 1], [2, 3]]


def test_adaptive_heads_compare_shifted_scores_where_the_graph_propagates() -> None:
    rows = [[-1.0, -2, -3, -4], [-10, -11, -12, -13]]
    base, graph = sharing(rows, 2), sharing(rows, 2, graph=PAPER)
    assert listed(base.indices) == [[0, 1, 2, 3], []]
    assert listed(graph.indices) == [[0, 1], [0, 1]]
    assert (base.changed, graph.changed) == (0, 2)
    assert base.kept_score_ratio == pytest.approx(6 / 12)
    assert graph.kept_score_ratio == pytest.approx(10 / 12)


@pytest.mark.parametrize(("second", "kept"), [(0.6, [[0, 1], [0, 1]]), (0.4, [[0, 1, 2], [0]])])
def test_adaptive_heads_with_sequential_compare_when_kept_and_at_the_end(second: float, kept: list[list[int]]) -> None:
    """Four alike at strength 1/2: 8 and 2 when they are kept, then 2 / 4 and 1 / 4; the other head's are alone."""
    keys = [[axis(0)] * 4, [axis(place) for place in range(4)]]
    graph = {**SEQUENTIAL, "strength": 0.5}
    assert heads([[8.0, 4, 2, 1], [1.5, second, 0.3, 0.2]], 2, keys=keys, graph=graph) == kept


def test_adaptive_heads_with_sequential_a_head_takes_more_than_its_share() -> None:
    layer = sharing([[8.0, 4, 2, 1], [0.5, 0.4, 0.3, 0]], 2, graph={**SEQUENTIAL, "strength": 0.5})
    assert listed(layer.indices) == [[0, 1, 2, 3], []]
    assert layer.changed == 0
    assert layer.kept_score_ratio == pytest.approx(15 / 16.2)


def test_adaptive_heads_candidates_alone_can_be_kept() -> None:
    """C = B = 2 of each head: no head has more to take."""
    assert heads([HIGH, LOW], 2, graph={**PAPER, "candidates": 1}) == [[0, 1], [0, 1]]
    assert heads([HIGH, LOW], 2, graph={**PAPER, "candidates": 1.5}) == [[0, 1, 2], [0]]


# --- cake -----------------------------------------------------------------------------------------------------------------

# the same numbers in both rows of the window, paired in three ways: one entropy, sample variances 0.01, 0.04 and 0.05
PAIRINGS = [[(0.0, 0.1), (0.2, 0.3)], [(0.0, 0.2), (0.1, 0.3)], [(0.0, 0.3), (0.1, 0.2)]]


def attention_of(*layers: list[tuple[float, float]], tokens: int = 22) -> torch.Tensor:
    """[L, 1, 2, n]: one query head's attention, two rows; the pairs stand first, zeros after them."""
    attention = torch.zeros(len(layers), 1, 2, tokens)
    for layer, pairs in enumerate(layers):
        for token, pair in enumerate(pairs):
            attention[layer, 0, :, token] = torch.tensor(pair)
    return attention


def sizes(attention: torch.Tensor, budget: int, *, window: int | None = 2, **fields: Any) -> list[int]:
    """How many tokens each layer keeps."""
    layers, _, _, tokens = attention.shape
    policy = Policy(budget, **{"scorer": "snapkv", "graph": None, **fields}, budget_allocation="cake", window=window)
    answer = select(torch.eye(tokens).expand(layers, 1, -1, -1), attention=attention, policy=policy)
    return [layer.indices.shape[-1] for layer in answer]


@pytest.mark.parametrize(("options", "wanted"), [
    ({"tau1": 1, "tau2": 1}, [5, 14, 17]),  # 30 shared as 1, 4, 5, beside the window's 2
    ({"tau1": 7, "tau2": 1}, [5, 14, 17]),  # equal entropies: tau1 does not matter
    ({"tau1": 1, "tau2": 2}, [8, 13, 15]),  # as 1, 2 and the root of 5: 5.7, 11.5, 12.8
])  # fmt: skip
def test_cake_shares_follow_the_variance(options: dict[str, float], wanted: list[int]) -> None:
    assert sizes(attention_of(*PAIRINGS), 12, options=options) == wanted


@pytest.mark.parametrize(("options", "wanted"), [
    ({"tau1": 1, "tau2": 1}, [6, 18]), ({"tau1": 0.5, "tau2": 1}, [4, 20]), ({"tau1": 1, "tau2": 0.5}, [4, 20]),
    ({"tau1": 1e30, "tau2": 1e30}, [12, 12]), ({"tau1": 0.001, "tau2": 0.001}, [2, 22]),
])  # fmt: skip
def test_cake_shares_follow_entropy_and_variance(options: dict[str, float], wanted: list[int]) -> None:
    """The second layer has the first's numbers twice: twice the entropy and twice the variance; 20 tokens shared."""
    twice = attention_of(PAIRINGS[0], PAIRINGS[0] * 2, tokens=40)
    assert sizes(twice, 12, options=options) == wanted


def test_cake_the_weights_by_default() -> None:
    """tau1 1.6 and tau2 0.6, in float64 loops."""
    generator = torch.Generator().manual_seed(3)
    attention = torch.rand(4, 3, 5, 90, generator=generator) ** torch.tensor([1.0, 2, 4, 8])[:, None, None, None]
    weights = []
    for layer in attention.double():
        entropy = -sum(float(a) * math.log(float(a) + 1e-10) for a in layer[..., :85].flatten())
        variance = sum(float(layer[head, :, token].var(correction=1)) for head in range(3) for token in range(85))
        weights.append(entropy ** (1 / 1.6) * variance ** (1 / 0.6))
    quotas = [4 * 15 * weight / sum(weights) for weight in weights]
    kept = sizes(attention, 20, window=5)
    assert sum(kept) == 4 * 20
    assert all(abs(own - 5 - quota) < 1 for own, quota in zip(kept, quotas, strict=True))


def test_cake_no_variance_no_share_and_none_at_all_is_uniform() -> None:
    still = [(0.2, 0.2), (0.1, 0.1)]
    assert sizes(attention_of(PAIRINGS[0], still), 7) == [12, 2]
    assert sizes(attention_of(still, still), 7) == [7, 7]
    assert sizes(attention_of(PAIRINGS[0], PAIRINGS[2])[:, :, 1:], 7, window=1) == [7, 7]  # one row does not vary


def test_cake_what_a_layer_cannot_take_is_shared_again() -> None:
    most = [(0.0, 0.9), (0.9, 0.0)]
    options = {"tau1": 1e30, "tau2": 1}  # V alone: 0.01, 0.04 and 0.81
    assert sizes(attention_of(PAIRINGS[0], PAIRINGS[1], most), 12, options=options) == [4, 10, 22]
    assert sizes(attention_of(PAIRINGS[0], PAIRINGS[1], most), 22, options=options) == [22, 22, 22]


def test_cake_reads_the_window_alone() -> None:
    """A scorer may take more rows than the window has; what the window's own tokens receive does not count."""
    attention = attention_of(*PAIRINGS)
    above = torch.cat([torch.rand(3, 1, 20, 22), attention], dim=2)
    above[..., 20:] = torch.rand(3, 1, 22, 2)
    wanted = sizes(attention, 12, options={"tau1": 1, "tau2": 1})
    assert sizes(above, 12, scorer="h2o", options={"tau1": 1, "tau2": 1}) == wanted


@pytest.mark.parametrize("scorer", ["knorm", "keydiff", "tova"])
def test_cake_goes_with_any_scorer_that_queries_or_attention_come_with(scorer: str) -> None:
    attention = attention_of(*PAIRINGS)
    assert sizes(attention, 12, scorer=scorer, options={"tau1": 1, "tau2": 1}) == [5, 14, 17]
    policy = Policy(12, scorer=scorer, budget_allocation="cake", window=2, graph=None)
    keys = torch.eye(22).expand(3, 1, -1, -1)
    for given, argument in (({}, "queries"), ({"scores": torch.rand(3, 1, 22)}, "scores")):
        with pytest.raises(InvalidInputError, match="cake") as caught:
            select(keys, policy=policy, **given)
        assert caught.value.argument == argument


@pytest.mark.parametrize("scorer", sorted(set(SCORERS) - {"given"}))
def test_cake_shares_come_from_the_windows_queries_whatever_the_scorer(scorer: str) -> None:
    inputs, window = prompt_for(scorer), 8
    queries = 3 * torch.randn(LAYERS, HEADS * GROUP, window, DIM) * torch.tensor([0.3, 1])[:, None, None, None]
    if SCORERS[scorer].query_rows == "all":
        queries = torch.cat([inputs["queries"][:, :, window:], queries], dim=2)
    answer = select(**(inputs | {"queries": queries}), policy=policy_of(scorer, budget_allocation="cake", window=window))
    sizes_by_scorer = [layer.indices.shape[1] for layer in answer]
    snapkv = select(
        inputs["keys"],
        queries=queries[:, :, -window:],
        policy=policy_of("snapkv", budget_allocation="cake", window=window, sinks=SCORERS[scorer].sinks),
    )
    assert sizes_by_scorer == [layer.indices.shape[1] for layer in snapkv]
    assert sum(sizes_by_scorer) == LAYERS * 40


def test_cake_candidates_are_those_of_the_layers_budget() -> None:
    """Each layer, computed alone with the budget it was given, answers the same."""
    torch.manual_seed(1)
    keys, queries = torch.randn(3, 2, 60, 8), 3 * torch.randn(3, 4, 6, 8) * torch.tensor([0.3, 1, 3])[:, None, None, None]
    fields = {"window": 6, "pool_width": 1, "graph": Graph(threshold=0.3, candidates=1.5)}
    together = select(keys, queries=queries, policy=Policy(20, budget_allocation="cake", **fields))
    found = [layer.indices.shape[1] for layer in together]
    assert len(set(found)) == 3
    assert sum(found) == 60
    for place, (layer, budget) in enumerate(zip(together, found, strict=True)):
        alone = select(keys[place][None], queries=queries[place][None], policy=Policy(budget, **fields)).layers[0]
        assert torch.equal(layer.indices, alone.indices)
        assert (layer.changed, layer.kept_score_ratio) == (alone.changed, alone.kept_score_ratio)


@pytest.mark.parametrize(
    "fields", [{"granularity": "layer"}, {"page_size": 3}, {"granularity": "layer", "page_size": 3}], ids=str
)
def test_cake_shares_hold_for_coarser_answers(fields: dict[str, Any]) -> None:
    size = fields.get("page_size", 1)
    wanted = [budget // size for budget in (5, 14, 17)]
    assert sizes(attention_of(*PAIRINGS), 12, options={"tau1": 1, "tau2": 1}, **fields) == wanted


def test_cake_what_is_not_finite_is_named() -> None:
    attention = attention_of(*PAIRINGS)
    attention[1, 0, 1, 7] = math.nan
    with pytest.raises(InvalidInputError, match="layer 1") as caught:
        sizes(attention, 12)
    assert (caught.value.argument, caught.value.reason) == ("attention", "NON_FINITE")
