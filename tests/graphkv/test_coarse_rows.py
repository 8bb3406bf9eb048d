"""One test for each row and formula about answers that heads, layers or the tokens of a page share, by hand.

docs/algorithm.md, "Coarser answers"; the budgets that layers or heads share are in test_shared_budgets.py. Where no keys are
named, no two tokens are alike and the graph changes nothing.
"""

import math

import pytest
import torch
from graphkv_testing.by_hand import PAPER, SEQUENTIAL, axis, chosen, listed

from graphkv import Graph, InvalidInputError, Policy, select

NONE = -math.inf
TWINS = [axis(0), axis(0), axis(1), axis(2)]  # tokens 0 and 1 are one


# --- granularity layer and model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("combine", "budget", "tokens"), [
    ("mean", 2, [1, 2]), ("max", 2, [0, 1]),  # 2, 2.5, 2.5, 0.5 and 4, 4, 3, 1
    ("mean", 1, [1]), ("max", 1, [0]), ("mean", 3, [0, 1, 2]),
])  # fmt: skip
def test_layer_heads_share_what_their_scores_combine_to(combine: str, budget: int, tokens: list[int]) -> None:
    layer = chosen([[4.0, 1, 3, 0], [0, 4, 2, 1]], budget, granularity="layer", combine=combine).layers[0]
    assert listed(layer.indices) == tokens
    assert layer.indices.dtype == torch.int32
    assert layer.granularity == "layer"
    assert layer.changed == 0


def test_layer_each_layer_has_its_own_answer() -> None:
    answer = chosen([[[4.0, 1, 3, 0]], [[0, 4, 2, 1]]], 2, granularity="layer")
    assert [listed(layer.indices) for layer in answer] == [[0, 2], [1, 2]]
    assert [layer.layer for layer in answer] == [0, 1]


@pytest.mark.parametrize(("combine", "tokens"), [("mean", [1, 2]), ("max", [0, 1])])
def test_model_layers_share_one_answer(combine: str, tokens: list[int]) -> None:
    answer = chosen([[[4.0, 1, 3, 0]], [[0, 4, 2, 1]]], 2, granularity="model", combine=combine)
    assert len(answer) == 1
    assert (answer.layers[0].layer, answer.layers[0].granularity) == (0, "model")
    assert listed(answer.indices[0]) == tokens
    both = chosen([[[4.0, 1, 3, 0], [8, 0, 0, 0]], [[0, 4, 2, 1], [0, 0, 4, 3]]], 2, granularity="model", combine=combine)
    assert listed(both.indices[0]) == ([0, 2] if combine == "mean" else [0, 1])  # 3, 1.25, 2.25, 1 and 8, 4, 4, 3


def test_shared_answers_keep_the_always_kept_once() -> None:
    rows = [[0.0, 1, 9, 2, 3, 0], [0, 2, 8, 1, 4, 0]]
    for granularity in ("layer", "model"):
        answer = chosen(rows, 4, granularity=granularity, sinks=1, window=1, pinned=[(3, 4)])
        assert listed(answer.indices[0]) == [0, 2, 3, 5]  # B_sel = 1, as for one row


def test_layer_updated_scores_are_combined() -> None:
    """The second head has another source: 4, 0, 2, 1 and 1, 2, 3, 4; without a graph all tokens are equal."""
    layer = chosen([[4.0, 3, 2, 1], [1, 2, 3, 4]], 2, keys=TWINS, graph=PAPER, granularity="layer").layers[0]
    assert listed(layer.indices) == [0, 2]
    assert layer.changed == 2  # token 2, in both rows
    assert layer.kept_score_ratio == pytest.approx((4 + 2 + 1 + 3) / 20)


def test_layer_a_token_outside_a_rows_candidates_counts_there_with_its_base_score() -> None:
    """Candidates 0, 1 and 2, 3, two twins each; updated 9, 0, 1, 2, 7 and 1, 2, 9, 0, 7."""
    keys = [axis(0), axis(0), axis(1), axis(1), axis(2)]
    graph = {**PAPER, "candidates": 1}
    rows = [[9.0, 8, 1, 2, 7], [1, 2, 9, 8, 7]]
    without = [row[:4] for row in rows]
    assert listed(chosen(without, 2, keys=keys[:4], graph=graph, granularity="layer").indices[0]) == [0, 2]
    layer = chosen(rows, 2, keys=keys, graph=graph, granularity="layer").layers[0]
    assert listed(layer.indices) == [0, 4]  # token 4 is nobody's candidate: the selection is from all contenders
    assert layer.changed == 0
    assert layer.kept_score_ratio == pytest.approx((9 + 7 + 1 + 7) / 54)


def test_layer_scores_are_shifted_row_by_row_where_the_graph_propagates() -> None:
    """Max of -5, -1, -9 and -100, -99, -50; shifted, of 4, 8, 0 and 0, 1, 50."""
    rows = [[-5.0, -1, -9], [-100, -99, -50]]
    for graph, token, kept, changed in ((None, 1, 9, 0), ({**PAPER, "strength": 0}, 1, 9, 0), (PAPER, 2, 50, 2)):
        layer = chosen(rows, 1, graph=graph, granularity="layer", combine="max").layers[0]
        assert listed(layer.indices) == [token]
        assert layer.kept_score_ratio == pytest.approx(kept / 63)  # shifted either way
        assert layer.changed == changed


@pytest.mark.parametrize("combine", ["mean", "max"])
@pytest.mark.parametrize("graph", [None, PAPER], ids=["base", "paper"])
def test_layer_minus_infinity_in_any_row_is_minus_infinity(combine: str, graph: dict[str, object] | None) -> None:
    rows = [[4.0, NONE, 3, 0], [0, 9, 2, 1]]
    layer = chosen(rows, 3, graph=graph, granularity="layer", combine=combine).layers[0]
    assert listed(layer.indices) == [0, 2, 3]
    assert layer.kept_score_ratio == pytest.approx(10 / 19)  # token 1 competes in the second row, and is not kept
    fewer = chosen([[*rows[0], 1], [0, 9, 2, NONE, 1]], 4, graph=graph, granularity="layer", combine=combine)
    assert listed(fewer.indices[0]) == [0, 2, 4]  # only three are left to compete
    assert listed(chosen(rows, 4, graph=graph, granularity="layer", combine=combine).indices[0]) == [0, 1, 2, 3]
    pinned = chosen(rows, 3, graph=graph, granularity="layer", combine=combine, pinned=[(1, 2)])
    assert listed(pinned.indices[0]) == [0, 1, 2]  # always kept, whatever its score


# --- votes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("last", "tokens", "changed"), [(4.0, [0, 2], 2), (5.0, [2, 3], 2)])
@pytest.mark.parametrize("combine", ["mean", "max"])
def test_votes_are_counted_then_base_scores_then_the_index(last: float, tokens: list[int], changed: int, combine: str) -> None:
    """The rows keep 0, 2 and 2, 3; sums of 0 and 3 are 5 and 1 + last. The base votes are 0, 1 and 2, 3: one each."""
    rows = [[4.0, 3, 2, 1], [1, 2, 3, last]]
    layer = chosen(rows, 2, keys=TWINS, graph=SEQUENTIAL, granularity="layer", combine=combine).layers[0]
    assert listed(layer.indices) == tokens
    assert layer.changed == changed  # token 2, a candidate in both rows
    assert layer.kept_score_ratio == pytest.approx(sum(row[token] for row in rows for token in tokens) / (16 + last))


def test_votes_are_for_candidates_alone() -> None:
    """Candidates 0, 1 and 2, 3: all kept by their own row. Token 4 would have the largest sum."""
    rows = [[9.0, 8, 1, 2, 7], [1, 2, 9, 8, 7]]
    layer = chosen(rows, 2, graph={**SEQUENTIAL, "candidates": 1}, granularity="layer").layers[0]
    assert listed(layer.indices) == [0, 2]  # sums where it is a candidate: 9, 8, 9, 8; over both rows all have 10
    assert layer.kept_score_ratio == pytest.approx(18 / 54)


def test_votes_minus_infinity_is_no_vote_in_that_row_alone() -> None:
    layer = chosen([[NONE, 5.0, 4, 3], [9, 1, 2, 3]], 2, graph=SEQUENTIAL, granularity="layer").layers[0]
    assert listed(layer.indices) == [0, 1]  # one vote each; sums 9, 6, 6, 6
    assert layer.kept_score_ratio == pytest.approx((9 + 5 + 1) / 27)


def test_votes_break_ties_by_shifted_scores() -> None:
    """Candidates 0 and 3: -1 is 3 after the shift by 4."""
    rows = [[-1.0, -2, -3, -4], [0, 0, 0, 2.5]]
    assert listed(chosen(rows, 1, graph={**SEQUENTIAL, "candidates": 1}, granularity="layer").indices[0]) == [0]


def test_votes_of_all_layers() -> None:
    answer = chosen([[[4.0, 3, 2, 1]], [[1, 2, 3, 5]]], 2, keys=TWINS, graph=SEQUENTIAL, granularity="model")
    assert [listed(layer.indices) for layer in answer] == [[2, 3]]
    assert answer.changed == [2]


def test_votes_nothing_propagates_and_the_base_scores_are_combined() -> None:
    rows = [[4.0, 3, 2, 1], [1, 2, 3, 5]]
    still = chosen(rows, 2, keys=TWINS, graph={**SEQUENTIAL, "strength": 0}, granularity="layer", combine="max")
    assert listed(still.indices[0]) == listed(chosen(rows, 2, granularity="layer", combine="max").indices[0]) == [0, 3]


# --- pages ----------------------------------------------------------------------------------------------------------------

ROW = [1.0, 2, 9, 0, 5, 5, 7, 1]


@pytest.mark.parametrize(("combine", "budget", "pages"), [
    ("mean", 4, [1, 2]), ("max", 4, [1, 3]),  # 1.5, 4.5, 5, 4 and 2, 9, 5, 7
    ("mean", 5, [1, 2]), ("mean", 3, [2]), ("mean", 1, [2]), ("max", 1, [1]), ("mean", 6, [1, 2, 3]), ("mean", 8, [0, 1, 2, 3]),
])  # fmt: skip
def test_pages_go_by_what_their_tokens_combine_to(combine: str, budget: int, pages: list[int]) -> None:
    answer = chosen([ROW], budget, page_size=2, combine=combine)
    assert listed(answer.indices[0]) == [pages]
    assert answer.layers[0].page_size == 2
    kept = sum(ROW[2 * page] + ROW[2 * page + 1] for page in pages)
    assert answer.kept_score_ratio == [1.0 if budget == 8 else pytest.approx(kept / 30)]


def test_pages_the_tokens_that_do_not_compete_do_not_count() -> None:
    assert listed(chosen([[NONE, 6.0, 9, 0, 5, 5]], 2, page_size=2).indices[0]) == [[0]]  # 6, 4.5, 5
    none = chosen([[NONE, NONE, 9.0, 0, 5, 5], [1, 1, 2, 2, 3, 3]], 4, page_size=2)
    assert listed(none.indices[0]) == [[1, 2], [1, 2]]
    ragged = chosen([[NONE, NONE, NONE, NONE, 5.0, 5], [1, 1, 2, 2, 3, 3]], 4, page_size=2)
    assert listed(ragged.indices[0]) == [[2], [1, 2]]  # a page where nothing competes is never kept


def test_pages_ties_go_to_the_lower_page() -> None:
    assert listed(chosen([[1.0, 3, 2, 2, 0, 4]], 4, page_size=2).indices[0]) == [[0, 1]]


def test_pages_with_always_kept_tokens_and_the_last_partial_page_count() -> None:
    assert listed(chosen([ROW], 4, page_size=2, sinks=1).indices[0]) == [[0, 2]]
    assert listed(chosen([ROW[:7]], 4, page_size=2).indices[0]) == [[2, 3]]
    assert listed(chosen([ROW[:7]], 6, page_size=2, sinks=1).indices[0]) == [[0, 2, 3]]
    assert listed(chosen([ROW[:7]], 7, page_size=2).indices[0]) == [[0, 1, 2, 3]]  # n within the budget


@pytest.mark.parametrize(("budget", "pages"), [(2, [2]), (4, [0, 2]), (6, [0, 2, 4]), (8, [0, 2, 3, 4])])
@pytest.mark.parametrize("granularity", ["head", "layer", "model"])
def test_pages_more_must_be_kept_than_fits(budget: int, pages: list[int], granularity: str) -> None:
    """Token 4 is pinned (page 2), the sink is in page 0, the window from the end in 4 and 3."""
    scores = [[5.0] * 9]
    kept = listed(chosen(scores, budget, page_size=2, granularity=granularity, pinned=[(4, 5)], sinks=1, window=2).indices[0])
    assert kept == ([pages] if granularity == "head" else pages)


def test_pages_the_last_partial_one_comes_after_sinks_and_window() -> None:
    assert [listed(chosen([[5.0] * 9], budget, page_size=2, sinks=4).indices[0]) for budget in (4, 6)] == [
        [[0, 1]],
        [[0, 1, 4]],
    ]
    with pytest.raises(InvalidInputError, match="2 pages") as caught:
        chosen([[5.0] * 9], 3, page_size=2, pinned=[(3, 5)])
    assert caught.value.argument == "pinned"


def test_pages_the_other_tokens_of_an_always_kept_page_are_in_the_graph() -> None:
    """The sink's neighbor, token 1, is the source and lowers 2 and 3 to zero."""
    keys = [axis(5), axis(0), axis(0), axis(0), axis(1), axis(2)]
    scores = [[0.0, 9, 5, 5, 8, 0.5]]
    layer = chosen(scores, 4, keys=keys, graph=PAPER, page_size=2, sinks=1).layers[0]
    assert listed(layer.indices) == [[0, 2]]
    assert layer.changed == 2  # both tokens of page 2
    assert layer.kept_score_ratio == pytest.approx((9 + 8 + 0.5) / 27.5)
    assert listed(chosen(scores, 4, page_size=2, sinks=1).indices[0]) == [[0, 1]]


def test_pages_a_token_outside_the_candidates_counts_with_its_base_score() -> None:
    """Candidates 0 and 2, twins: pages 4.5, 0, 5.5, 1."""
    keys = [axis(0), axis(1), axis(0), *map(axis, range(2, 7))]
    answer = chosen([[9.0, 0, 8, 0, 5, 6, 1, 1]], 2, keys=keys, graph={**PAPER, "candidates": 1}, page_size=2)
    assert listed(answer.indices[0]) == [[2]]


@pytest.mark.parametrize(("last", "pages"), [(2.0, [0, 2]), (3.0, [2, 3])])
def test_pages_sequential_go_by_how_many_of_their_tokens_are_kept(last: float, pages: list[int]) -> None:
    """Kept are 0, 6, 5, 4: pages 1, 0, 2, 1; sums of pages 0 and 3 are 9 and 7 + last."""
    keys = [axis(0), axis(1), axis(0), *map(axis, range(2, 7))]
    scores = [[9.0, 0, 8, 1, 5, 6, 7, last]]
    answer = chosen(scores, 4, keys=keys, graph=SEQUENTIAL, page_size=2)
    assert listed(answer.indices[0]) == [pages]
    four = chosen(scores, 4, keys=keys, graph={**SEQUENTIAL, "candidates": 1}, page_size=2)
    assert listed(four.indices[0]) == [[0, 1]]  # candidates 0, 2, 6, 5: one each, sums 9, 8, 6, 7 of those


def test_pages_sequential_never_keep_one_without_a_candidate() -> None:
    assert listed(chosen([[5.0, 6, NONE, NONE, NONE, NONE]], 4, graph=SEQUENTIAL, page_size=2).indices[0]) == [[0]]


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_pages_of_shared_answers_combine_rows_before_tokens(granularity: str) -> None:
    """Means 5, none, 3, 3, 0.5, 0.5: page 0 goes by its one contender. Token 1 is kept, and competes in the second row."""
    layer = chosen([[9.0, NONE, 3, 3, 0, 1], [1, 9, 3, 3, 1, 0]], 2, granularity=granularity, page_size=2).layers[0]
    assert listed(layer.indices) == [0]
    assert layer.kept_score_ratio == pytest.approx((9 + 1 + 9) / 33)
    assert layer.kept_ranges() == [[(0, 2)]]


def test_pages_of_shared_answers_count_the_votes_of_all_rows() -> None:
    """Kept are 0, 2 and 2, 3 of two pages: 1 vote and 3."""
    answer = chosen([[4.0, 3, 2, 1], [1, 2, 3, 4]], 2, keys=TWINS, graph=SEQUENTIAL, granularity="layer", page_size=2)
    assert listed(answer.indices[0]) == [1]
    assert answer.changed == [4]  # the base votes are equal, and so are the sums: page 0


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_page_align_raises_the_budget_of_shared_answers_too(granularity: str) -> None:
    answer = chosen([[float(token) for token in range(10)]] * 2, 3, granularity=granularity, page_align=4)
    assert answer.indices[0].shape[-1] == 6  # 10 less one page of 4


# --- edge cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["layer", "model"])
@pytest.mark.parametrize("page_size", [None, 2])
def test_shared_answers_within_the_budget_keep_all(granularity: str, page_size: int | None) -> None:
    for graph in (None, PAPER, SEQUENTIAL):
        answer = chosen([[NONE, 1.0, 2], [1, NONE, 3]], 3, graph=graph, granularity=granularity, page_size=page_size)
        assert listed(answer.indices[0]) == ([0, 1, 2] if page_size is None else [0, 1])
        assert (answer.kept_score_ratio, answer.changed) == ([1.0], [0])


def test_shared_answers_where_nothing_competes_keep_the_always_kept() -> None:
    for granularity in ("layer", "model"):
        answer = chosen([[NONE] * 4, [1.0] * 4], 2, granularity=granularity, sinks=1)
        assert listed(answer.indices[0]) == [0]
        assert answer.kept_score_ratio == [0.0]
    assert chosen([[0.0] * 4] * 2, 2, granularity="layer").kept_score_ratio == [1.0]  # all are zero


def test_evict_is_for_heads() -> None:
    """Pages of a head's own tokens too: evicted ones come after all others there."""
    for granularity in ("layer", "model"):
        with pytest.raises(InvalidInputError, match="evict") as caught:
            Policy(4, granularity=granularity, graph=Graph(signal="evict"))
        assert caught.value.argument == "granularity"
    graph = {**PAPER, "signal": "evict", "neighbors": None, "threshold": 0.5}
    assert listed(chosen([[4.0, 3, 2, 1]], 2, keys=TWINS, graph=graph).indices[0]) == [[0, 2]]
    assert listed(chosen([[4.0, 3, 2, 1]], 2, keys=TWINS, graph=graph, page_size=2, combine="max").indices[0]) == [[0]]


def test_shared_answers_of_one_prompt_do_not_know_the_others() -> None:
    torch.manual_seed(0)
    keys, scores = torch.randn(3, 2, 2, 20, 8), torch.rand(3, 2, 2, 20)
    policy = Policy(6, scorer="given", granularity="model", graph=Graph(threshold=0.3))
    together = select(list(keys), scores=list(scores), policy=policy)
    for place in range(3):
        alone = select(keys[place], scores=scores[place], policy=policy)
        assert torch.equal(alone.indices[0], together[place].indices[0])
