"""What an answer holds on request, by hand; and against what follows from the kept tokens and the scores, whatever the policy."""

import contextlib
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from graphkv_testing.by_hand import PAPER, SEQUENTIAL, axis, chosen, listed, towards

from graphkv import Graph, InvalidInputError, Policy, Selection, select
from graphkv.terms.catalogue import OUTPUTS
from graphkv.terms.selection import LayerSelection

NONE, ALL = -math.inf, math.inf
TWINS = [axis(0), axis(0), axis(1), axis(2)]  # tokens 0 and 1 are one
ROW = [4.0, 3, 2, 1]


def output(name: str, scores: list[Any], budget: int, /, **others: Any) -> Any:
    return listed(chosen(scores, budget, outputs=[name], **others).layers[0].outputs[name])


# --- updated_scores -------------------------------------------------------------------------------------------------------


def test_updated_scores_of_heads() -> None:
    assert output("updated_scores", [ROW], 2) == [ROW]
    assert output("updated_scores", [ROW], 2, keys=TWINS, graph=PAPER) == [[4, 0, 2, 1]]
    assert output("updated_scores", [[0, *ROW]], 3, sinks=1, keys=[axis(5), *TWINS], graph=PAPER) == [[ALL, 4, 0, 2, 1]]
    assert output("updated_scores", [[*ROW, NONE]], 2, keys=[*TWINS, axis(3)], graph=PAPER) == [[4, 0, 2, 1, NONE]]
    assert output("updated_scores", [ROW], 4, keys=TWINS, graph=PAPER) == [[ALL] * 4]  # n within the budget


def test_updated_scores_are_shifted_where_the_graph_propagates() -> None:
    below = [score - 5 for score in ROW]  # -1 to -4
    assert output("updated_scores", [below], 2) == [below]
    assert output("updated_scores", [below], 2, keys=TWINS, graph=PAPER) == [[3, 0, 1, 0]]
    assert output("updated_scores", [below], 2, keys=TWINS, graph={**PAPER, "strength": 0}) == [below]
    assert output("updated_scores", [below], 2, keys=TWINS, graph={**PAPER, "candidates": 1}) == [[3, 0, 1, 0]]  # 2, 3 outside


@pytest.mark.parametrize(("graph", "wanted"), [
    ({"signal": "enhance", "strength": 0.5}, [4, 4.5, 2, 1]), ({"rounds": 2, "strength": 0.5}, [4, 0.75, 2, 1]),
    ({"update": "additive", "strength": 0.25}, [4, 2.25, 2, 1]), ({"signal": "evict", "strength": 0.1}, [4, -1, 2, 1]),
])  # fmt: skip
def test_updated_scores_of_every_update(graph: dict[str, Any], wanted: list[float]) -> None:
    assert output("updated_scores", [ROW], 2, keys=TWINS, graph=PAPER | graph) == [wanted]


def test_updated_scores_of_evicted_tokens_are_their_rank_below_zero() -> None:
    """Ordered by score, then index: 2, then 1, then 3."""
    keys = [axis(0)] * 4 + [axis(1)]
    assert output("updated_scores", [[9, 2, 5, 2, 0]], 1, keys=keys, graph={**PAPER, "signal": "evict", "neighbors": 9}) == [
        [9, -2, -1, -3, 0]
    ]


def test_updated_scores_of_sequential_are_those_when_kept_and_at_the_end() -> None:
    """Four alike: 8, then 4 / 2, then both lower the rest."""
    graph = {**SEQUENTIAL, "strength": 0.5}
    assert output("updated_scores", [[8, 4, 2, 1]], 2, keys=[axis(0)] * 4, graph=graph) == [[8, 2, 0.5, 0.25]]


def test_updated_scores_of_shared_answers_are_combined() -> None:
    rows = [ROW, [1, 2, 3, 4]]
    for combine, wanted in (("mean", [2.5, 1, 2.5, 2.5]), ("max", [4, 2, 3, 4])):
        for granularity in ("layer", "model"):
            fields = {"granularity": granularity, "combine": combine, "keys": TWINS, "graph": PAPER}
            assert output("updated_scores", rows, 2, **fields) == wanted
            assert output("updated_scores", rows, 2, page_size=2, **fields) == wanted
    some = output("updated_scores", [[0, NONE, 3, 2], [0, 1, 4, 3]], 2, granularity="layer", sinks=1)
    assert some == [ALL, NONE, 3.5, 2.5]
    assert output("updated_scores", rows, 4, granularity="layer") == [ALL] * 4


def test_updated_scores_of_votes_are_the_votes() -> None:
    assert output("updated_scores", [ROW, [1, 2, 3, 4]], 2, keys=TWINS, graph=SEQUENTIAL, granularity="layer") == [1, 0, 2, 1]
    rows = [[9.0, 8, 1, 2, 7, 0, 0.5], [1, 2, 9, 8, 7, 0, 0.5]]  # candidates 1, 3, 4 and 2, 3, 4, one place
    graph = {**SEQUENTIAL, "candidates": 1}
    assert output("updated_scores", rows, 3, graph=graph, granularity="model", sinks=1, pinned=[(5, 6)]) == [
        ALL, 1, 1, 0, 0, ALL, NONE,
    ]  # fmt: skip


def test_pages_do_not_change_the_updated_scores() -> None:
    for graph in (None, PAPER, SEQUENTIAL):
        tokens, pages = (output("updated_scores", [ROW], 2, keys=TWINS, graph=graph, page_size=size) for size in (None, 2))
        assert tokens == pages == [[4, 3 if graph is None else 0, 2, 1]]


# --- decay_factors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("graph", "factor"), [
    ({}, 0.4 * 0.2), ({"rounds": 3}, (0.4 * 0.2) ** 3), ({"strength": 0.5}, 0.7 * 0.6), ({"update": "additive"}, 1 - 0.6 - 0.8),
    ({"signal": "enhance"}, 1.6 * 1.8), ({"signal": "enhance", "update": "additive"}, 1 + 0.6 + 0.8), ({"signal": "evict"}, 0.0),
    ({"strength": 0.0}, 1.0), ({"rounds": 0}, 1.0), ({"candidates": 1}, 1.0),
])  # fmt: skip
def test_decay_factors_are_products_over_the_sources(graph: dict[str, Any], factor: float) -> None:
    """Token 2 has cosines 0.6 and 0.8 to the two sources."""
    keys = [axis(0), axis(1), [0.6, 0.8, *axis(0)[2:]], axis(4), axis(5)]
    found = output("decay_factors", [[9, 8, 1, 2, 3]], 3, keys=keys, graph=PAPER | {"source_ratio": 0.7} | graph)
    assert found == [[1, 1, pytest.approx(factor, rel=1e-6), 1, 1]]


def test_decay_factors_of_sequential() -> None:
    """Token 1 has cosine 0.5 to token 0 and is kept after it; token 2 is like both, and is left."""
    keys = [axis(0), towards(0, 0.5, aside=1), axis(0), axis(5)]
    graph = {**SEQUENTIAL, "strength": 0.5}
    assert output("decay_factors", [[9, 8, 1, 0.5]], 2, keys=keys, graph=graph) == [
        [1, pytest.approx(0.75), pytest.approx(0.5 * 0.75), 1]
    ]
    assert output("decay_factors", [[9, 8, 1, 0.5]], 4, keys=keys, graph=graph) == [[1] * 4]  # nothing competes
    wide = output("decay_factors", [[9, 8, 1, 0.5, NONE]], 4, keys=[*keys, axis(6)], graph=graph)
    assert wide == [[1, pytest.approx(0.75), pytest.approx(0.5 * 0.75), 1, 1]]  # all candidates are kept, in their order


# --- choice_order ---------------------------------------------------------------------------------------------------------


def test_choice_order_is_first_to_last() -> None:
    assert output("choice_order", [[2, 4, 3, 1], ROW[::-1]], 3, keys=TWINS, graph=SEQUENTIAL) == [[1, 2, 3], [3, 2, 1]]
    assert output("choice_order", [[0, 2, 4, 3, NONE]], 5, graph=SEQUENTIAL) == [[]]  # n within the budget
    assert output("choice_order", [[0, 2, 4, NONE, NONE]], 4, graph=SEQUENTIAL, sinks=1) == [[2, 1, -1]]
    assert output("choice_order", [[2, 4, 3, 1]], 3, keys=TWINS, graph={**SEQUENTIAL, "strength": 0}) == [[1, 2, 0]]


# --- what follows from the kept tokens ------------------------------------------------------------------------------------


def test_masks_ranges_and_moves() -> None:
    names = ["keep_mask", "dropped_ranges", "moves"]
    answer = chosen([[0, 5, 4, 0, 0, 3], [6, 5, 4, 0, 0, 0]], 3, outputs=names).layers[0]
    assert listed(answer.outputs["keep_mask"]) == [[False, True, True, False, False, True], [True] * 3 + [False] * 3]
    assert listed(answer.outputs["dropped_ranges"]) == [[0, 0, 1], [0, 3, 5], [1, 3, 6]]
    assert listed(answer.outputs["moves"]) == [[0, 1, 0], [0, 2, 1], [0, 5, 2]]
    assert {name: answer.outputs[name].dtype for name in names} == {
        "keep_mask": torch.bool, "dropped_ranges": torch.int32, "moves": torch.int32,
    }  # fmt: skip
    shared = chosen([[0, 5, 4, 0, 0, 3]], 3, outputs=names, granularity="layer").layers[0].outputs
    assert listed(shared["keep_mask"]) == [False, True, True, False, False, True]
    assert listed(shared["dropped_ranges"]) == [[0, 0, 1], [0, 3, 5]]
    paged = chosen([[0, 5, 4, 0, 0, 3, 9]], 5, outputs=names, page_size=2).layers[0].outputs  # pages 0 and 3, in tokens
    assert listed(paged["keep_mask"]) == [[True, True, False, False, False, False, True]]
    assert (listed(paged["dropped_ranges"]), listed(paged["moves"])) == ([[0, 2, 6]], [[0, 6, 2]])
    everything = chosen([[0, 5, 4]], 3, outputs=names).layers[0].outputs
    assert (listed(everything["dropped_ranges"]), listed(everything["moves"])) == ([], [])
    assert everything["moves"].shape == (0, 3)


# --- any policy -----------------------------------------------------------------------------------------------------------

BASE = {
    "head": Policy(14, scorer="given", graph=Graph(threshold=0.2, candidates=2)),
    "sequential": Policy(14, scorer="given", graph=Graph(update="sequential", strength=0.7, candidates=2), sinks=2),
    "evict": Policy(14, scorer="given", graph=Graph(signal="evict", threshold=0.2), window=3),
    "base": Policy(14, scorer="given", graph=None, sinks=1),
    "adaptive": Policy(
        14,
        scorer="given",
        graph=Graph(threshold=0.2, candidates=None),
        budget_allocation="adaptive_heads",
        window=2,
        options={"alpha": 0},
    ),
    "adaptive-sequential": Policy(14, scorer="given", graph=Graph(update="sequential"), budget_allocation="adaptive_heads"),
    "layer": Policy(14, scorer="given", graph=Graph(threshold=0.2, candidates=2), granularity="layer", sinks=2),
    "layer-max": Policy(14, scorer="given", graph=Graph(threshold=0.2), granularity="layer", combine="max", window=3),
    "votes": Policy(14, scorer="given", graph=Graph(update="sequential", candidates=2), granularity="layer", window=1),
    "model": Policy(14, scorer="given", graph=Graph(threshold=0.2, candidates=2), granularity="model", sinks=2),
    "pages": Policy(14, scorer="given", graph=Graph(threshold=0.2, candidates=2), page_size=3, sinks=2),
    "pages-votes": Policy(14, scorer="given", graph=Graph(update="sequential", candidates=2), page_size=3, window=1),
    "pages-model": Policy(14, scorer="given", graph=Graph(threshold=0.2, candidates=2), page_size=3, granularity="model"),
    "aligned": Policy(14, scorer="given", graph=Graph(threshold=0.2), page_align=8, granularity="layer"),
}
TOKENS = {"short": 13, "long": 62}


def random_prompt(tokens: int, *, padding: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(2, 3, tokens, generator=generator) - 0.2
    if padding:
        scores[0, 1, 5:] = NONE
        scores[1, :, ::3] = NONE
    centers = torch.randn(2, 3, 6, 8, generator=generator)
    likes = torch.randint(6, (2, 3, tokens, 1), generator=generator).expand(-1, -1, -1, 8)
    return {"keys": centers.gather(2, likes) + 0.3 * torch.randn(2, 3, tokens, 8, generator=generator), "scores": scores}


def given_by(policy: Policy) -> list[str]:
    """The outputs that a policy can give."""
    found = []
    for name in OUTPUTS:
        with contextlib.suppress(InvalidInputError):
            select(**random_prompt(13), policy=policy, outputs=[name])
            found.append(name)
    return found


def kept_masks(layer: LayerSelection) -> np.ndarray:
    """bool [rows, n] from the indices alone."""
    mask = np.zeros((len(layer.rows), layer.num_tokens), dtype=bool)
    for row, ids in enumerate(layer.rows):
        for place in ids.tolist():
            size = layer.page_size or 1
            mask[row, place * size : (place + 1) * size] = True
    return mask


def tokens_follow(layer: LayerSelection) -> None:
    """Masks, ranges and moves are what `LayerSelection` makes of the indices."""
    mask, found = kept_masks(layer), layer.outputs
    shared = layer.granularity != "head"
    assert np.array_equal(np.asarray(found["keep_mask"]), mask[0] if shared else mask)
    dropped = [[row, *edges] for row, ranges in enumerate(layer.dropped()) for edges in ranges]
    assert listed(found["dropped_ranges"]) == dropped
    moves = [[row, *pair] for row, pairs in enumerate(layer.moves()) for pair in pairs]
    assert listed(found["moves"]) == moves


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("length", TOKENS)
@pytest.mark.parametrize("name", BASE)
def test_outputs_follow_from_what_is_kept(name: str, length: str, padding: bool) -> None:
    policy, inputs = BASE[name], random_prompt(TOKENS[length], padding=padding)
    names = given_by(policy)
    plain, answer = select(**inputs, policy=policy), select(**inputs, policy=policy, outputs=names)
    assert isinstance(answer, Selection)
    for layer, without in zip(answer, plain, strict=True):
        assert listed(layer.indices) == listed(without.indices)  # to ask changes nothing
        assert (layer.changed, layer.kept_score_ratio) == (without.changed, without.kept_score_ratio)
        assert (list(layer.outputs), dict(without.outputs)) == (names, {})
        tokens_follow(layer)
        best_are_kept(layer, policy)
    if "choice_order" in names:
        for layer in answer:
            for row, order in zip(layer.rows, layer.outputs["choice_order"], strict=True):
                contenders = order[order >= 0].tolist()
                assert len(set(contenders)) == len(contenders)
                assert set(contenders) <= set(row.tolist())


def best_are_kept(layer: LayerSelection, policy: Policy) -> None:
    """Always-kept tokens, and of the others the best by updated score, as far as that alone decides."""
    values, mask = np.atleast_2d(np.asarray(layer.outputs["updated_scores"], dtype=np.float64)), kept_masks(layer)
    assert mask[np.isposinf(values)].all()
    if policy.page_size is not None or (policy.graph is not None and policy.graph.update == "sequential"):
        return  # decided by a whole page, or by an order of choice
    assert not mask[np.isneginf(values)].any()
    if policy.granularity == "head" and policy.graph is not None and policy.graph.candidates is not None:
        return  # a token outside the candidates may be better
    together = policy.budget_allocation == "adaptive_heads" and policy.option("alpha") == 0.0
    for row in [slice(None)] if together else range(len(mask)):
        kept, left = values[row][mask[row] & np.isfinite(values[row])], values[row][~mask[row] & np.isfinite(values[row])]
        assert not kept.size or not left.size or kept.min() >= left.max()


TIMES = [name for name in BASE if "decay_factors" in given_by(BASE[name]) and name != "evict"]  # evict's are ranks


@pytest.mark.parametrize("name", TIMES)
def test_updated_scores_are_the_base_scores_times_the_factors(name: str) -> None:
    policy, inputs = BASE[name], random_prompt(62, padding=True)
    names = ["updated_scores", "decay_factors"]
    for layer, scores in zip(select(**inputs, policy=policy, outputs=names), inputs["scores"].double(), strict=True):
        for row, values, factors in zip(scores, *(layer.outputs[one].double() for one in names), strict=True):
            competes = torch.isfinite(values)
            smallest = 0.0 if policy.graph is None else min(0.0, float(row[competes].min()))
            torch.testing.assert_close(values[competes], ((row - smallest) * factors)[competes], rtol=2e-6, atol=1e-12)
            assert (factors[~competes] == 1.0).all()


# --- asking ---------------------------------------------------------------------------------------------------------------


def test_outputs_come_in_one_order_and_once() -> None:
    inputs = random_prompt(13)
    answer = select(**inputs, policy=BASE["head"], outputs=["moves", "updated_scores", "moves"])
    assert list(answer.layers[0].outputs) == ["updated_scores", "moves"]


def test_outputs_are_arrays_of_the_callers_kind() -> None:
    inputs = random_prompt(62)
    names = given_by(BASE["sequential"])
    mine = select(**inputs, policy=BASE["sequential"], outputs=names)
    theirs = select(**{role: array.numpy() for role, array in inputs.items()}, policy=BASE["sequential"], outputs=names)
    wanted = {"updated_scores": "float32", "keep_mask": "bool", "decay_factors": "float32"}
    for one, other in zip(mine, theirs, strict=True):
        for name in names:
            assert isinstance(one.outputs[name], torch.Tensor)
            assert isinstance(other.outputs[name], np.ndarray)
            assert np.array_equal(one.outputs[name].numpy(), other.outputs[name])
            assert str(other.outputs[name].dtype) == wanted.get(name, "int32")


def test_outputs_of_a_batch_are_those_of_each_prompt() -> None:
    prompts = [random_prompt(tokens) for tokens in (62, 13, 40)]
    for policy in BASE.values():
        names = given_by(policy)
        batch: Mapping[str, Any] = {role: [own[role] for own in prompts] for role in ("keys", "scores")}
        for own, together in zip(prompts, select(**batch, policy=policy, outputs=names), strict=True):
            for one, other in zip(select(**own, policy=policy, outputs=names), together, strict=True):
                assert all(torch.equal(one.outputs[name], other.outputs[name]) for name in names)


SEQUENTIAL_GRAPH = Graph(update="sequential")


@pytest.mark.parametrize(("policy", "outputs", "names"), [
    (Policy(4, scorer="given"), ["scores"], "scores"), (Policy(4, scorer="given"), "moves", "moves"), (Policy(4, scorer="given"), 5, "5"),
    (Policy(4, scorer="given"), [None], "None"),
    *(((Policy(4, scorer="given", granularity=granularity), ["decay_factors"], granularity)) for granularity in ("layer", "model")),
    (Policy(4, scorer="given"), ["choice_order"], "sequential"), (Policy(4, scorer="given", graph=None), ["choice_order"], "sequential"),
    (Policy(4, scorer="given", graph=SEQUENTIAL_GRAPH, granularity="layer"), ["choice_order"], "sequential"),
    (Policy(4, scorer="given", graph=SEQUENTIAL_GRAPH, page_size=2), ["choice_order"], "sequential"),
    (Policy(4, scorer="given", graph=SEQUENTIAL_GRAPH, budget_allocation="adaptive_heads"), ["choice_order"], "sequential"),
])  # fmt: skip
def test_outputs_that_a_policy_cannot_give_are_named(policy: Policy, outputs: Any, names: str) -> None:
    with pytest.raises(InvalidInputError, match=names) as caught:
        select(**random_prompt(13), policy=policy, outputs=outputs)
    assert caught.value.argument == "outputs"


def test_every_output_is_given_by_some_policy() -> None:
    assert set(itertools.chain(*(given_by(policy) for policy in BASE.values()))) == set(OUTPUTS)
