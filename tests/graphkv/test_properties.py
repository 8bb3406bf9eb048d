"""What must hold whatever the numbers: small prompts drawn by hypothesis, every granularity and budget."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphkv_testing.by_hand import listed
from hypothesis import given, settings
from hypothesis import strategies as st

from graphkv import Graph, Policy, Selection, select
from graphkv.budgets import plan_layers

NONE = -math.inf
KINDS: dict[str, dict[str, Any]] = {
    "head": {}, "layer": {"granularity": "layer"}, "model": {"granularity": "model"}, "max": {"granularity": "layer", "combine": "max"},
    "pages": {"page_size": 3}, "layer-pages": {"granularity": "layer", "page_size": 3}, "aligned": {"page_align": 4},
    "adaptive": {"budget_allocation": "adaptive_heads"},
}  # fmt: skip
GRAPHS = {
    "base": None,
    "product": Graph(threshold=0.2, candidates=2),
    "paper": Graph(neighbors="auto", threshold=0.0, candidates=None),
    "sequential": Graph(update="sequential", strength=0.6, candidates=2),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
FEW = settings(max_examples=12, deadline=None)


def prompt(seed: int, tokens: int, *, padded: int = 0) -> dict[str, torch.Tensor]:
    """Two layers of three heads; some keys are alike, the scores of `padded` places are -inf."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(2, 3, 5, 8, generator=generator)
    likes = torch.randint(5, (2, 3, tokens, 1), generator=generator).expand(-1, -1, -1, 8)
    keys = centers.gather(2, likes) + 0.3 * torch.randn(2, 3, tokens, 8, generator=generator)
    scores = torch.rand(2, 3, tokens, generator=generator) - 0.2 * (seed % 2)
    scores[..., torch.randperm(tokens, generator=generator)[:padded]] = NONE
    return {"keys": keys, "scores": scores}


def policy_of(kind: str, budget: int, graph: Graph | None, **fields: Any) -> Policy:
    return Policy(budget, scorer="given", graph=graph, **{**KINDS[kind], **fields})


def answered(inputs: dict[str, torch.Tensor], policy: Policy, **others: Any) -> Selection:
    answer = select(**inputs, policy=policy, **others)
    assert isinstance(answer, Selection)
    return answer


def rows_of(answer: Selection) -> list[Any]:
    return [listed(layer.indices) for layer in answer]


cases = st.tuples(st.integers(0, 10**6), st.integers(5, 45), st.integers(1, 30))


@EVERY
@FEW
@given(case=cases)
def test_strength_0_is_the_base_method(kind: str, case: tuple[int, int, int]) -> None:
    seed, tokens, budget = case
    inputs, base = (
        prompt(seed, tokens, padded=tokens // 4),
        answered(prompt(seed, tokens, padded=tokens // 4), policy_of(kind, budget, None)),
    )
    for graph in (value for value in GRAPHS.values() if value is not None):
        still = answered(inputs, policy_of(kind, budget, replace(graph, strength=0.0)))
        assert rows_of(still) == rows_of(base)
        assert (still.kept_score_ratio, still.changed) == (base.kept_score_ratio, [0] * len(base))


@pytest.mark.parametrize("update", ["product", "additive", "sequential"])
@settings(max_examples=20, deadline=None)
@given(case=cases, strength=st.floats(0.01, 1), rounds=st.integers(1, 3))
def test_decay_never_raises_and_enhance_never_lowers(
    update: str, case: tuple[int, int, int], strength: float, rounds: int
) -> None:
    """Beside the base scores as the graph sees them: those of a graph whose threshold nobody reaches."""
    seed, tokens, budget = case
    inputs = prompt(seed, tokens)
    fields = {"threshold": 0.2, "candidates": None, "strength": strength}
    alone = inputs | {"keys": torch.eye(tokens).expand(2, 3, -1, -1)}  # no two alike
    for signal in ("decay",) if update == "sequential" else ("decay", "enhance"):
        graph = Graph(update=update, signal=signal, rounds=rounds if update == "product" else 1, **fields)
        policy = policy_of("head", budget, graph)
        for one, other in zip(*(answered(own, policy, outputs=["updated_scores"]) for own in (inputs, alone)), strict=True):
            changed, plain = one.outputs["updated_scores"], other.outputs["updated_scores"]
            assert bool((changed <= plain if signal == "decay" else changed >= plain).all())


@EVERY
@FEW
@given(case=cases)
def test_a_larger_budget_keeps_what_a_smaller_one_kept(kind: str, case: tuple[int, int, int]) -> None:
    """The base method; AdaKV without a safe share, which is another one for each budget."""
    seed, tokens, budget = case
    inputs, fields = prompt(seed, tokens, padded=tokens // 4), {"options": {"alpha": 0}} if kind == "adaptive" else {}
    small, large = (answered(inputs, policy_of(kind, own, None, **fields)) for own in (budget, budget + 1))
    for one, other in zip(small, large, strict=True):
        for few, many in zip(one.rows, other.rows, strict=True):
            assert set(few.tolist()) <= set(many.tolist())


@settings(max_examples=30, deadline=None)
@given(case=cases, more=st.integers(1, 20), sinks=st.integers(0, 2))
def test_sequential_is_prefix_consistent(case: tuple[int, int, int], more: int, sinks: int) -> None:
    """All contenders are candidates and A is the same: the first choices do not depend on the budget."""
    seed, tokens, budget = case
    budget = min(budget + sinks, tokens - 1)
    graph = Graph(update="sequential", strength=0.6, candidates=None)
    small, large = (
        answered(prompt(seed, tokens), policy_of("head", own, graph, sinks=sinks), outputs=["choice_order"])
        for own in (budget, min(budget + more, tokens - 1))
    )
    for one, other in zip(small, large, strict=True):
        first, longer = one.outputs["choice_order"], other.outputs["choice_order"]
        assert torch.equal(first, longer[:, : first.shape[1]])


@EVERY
@pytest.mark.parametrize("graph", GRAPHS)
@settings(max_examples=6, deadline=None)
@given(case=cases)
def test_batches_runs_and_threads_change_no_row(kind: str, graph: str, case: tuple[int, int, int]) -> None:
    seed, tokens, budget = case
    policy, prompts = policy_of(kind, budget, GRAPHS[graph]), [prompt(seed, tokens), prompt(seed + 1, tokens + 7)]
    alone = [rows_of(answered(own, policy)) for own in prompts]
    batch = select(**{role: [own[role] for own in prompts] for role in ("keys", "scores")}, policy=policy)
    assert [rows_of(own) for own in batch] == alone
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert [rows_of(answered(own, policy)) for own in prompts] == alone
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", [name for name in KINDS if name not in ("pages", "layer-pages", "aligned")])
@pytest.mark.parametrize("graph", GRAPHS)
@settings(max_examples=6, deadline=None)
@given(case=cases, padding=st.integers(1, 9))
def test_padding_at_the_end_changes_no_row(kind: str, graph: str, case: tuple[int, int, int], padding: int) -> None:
    """Where n is above B either way; pages and page_align are about n."""
    seed, tokens, budget = case
    budget = min(budget, tokens - 1)
    inputs = prompt(seed, tokens)
    padded = {
        "keys": torch.cat([inputs["keys"], torch.ones(2, 3, padding, 8)], dim=2),
        "scores": torch.cat([inputs["scores"], torch.full((2, 3, padding), NONE)], dim=2),
    }
    policy = policy_of(kind, budget, GRAPHS[graph])
    assert rows_of(answered(padded, policy)) == rows_of(answered(inputs, policy))


@EVERY
@pytest.mark.parametrize("graph", GRAPHS)
@settings(max_examples=6, deadline=None)
@given(case=cases)
def test_the_kept_set_has_the_size_the_policy_says(kind: str, graph: str, case: tuple[int, int, int]) -> None:
    seed, tokens, budget = case
    policy = policy_of(kind, budget, GRAPHS[graph], sinks=2)
    answer = answered(prompt(seed, tokens), policy)
    for layer, plan in zip(answer, plan_layers(policy, num_tokens=tokens, num_layers=2, caller_scores=True), strict=False):
        sizes = [len(row) for row in layer.rows]
        if policy.page_size is not None:
            assert all(size <= plan.page_count for size in sizes)
            assert graph == "sequential" or set(sizes) == {plan.page_count}
        elif kind == "adaptive":
            assert sum(sizes) == 3 * min(plan.budget, tokens)
        else:
            assert set(sizes) == {min(plan.budget, tokens)}


@settings(max_examples=15, deadline=None)
@given(case=cases, graph=st.sampled_from(sorted(GRAPHS)))
def test_the_layers_of_cake_keep_its_total(case: tuple[int, int, int], graph: str) -> None:
    seed, tokens, budget = case
    keys = prompt(seed, tokens)["keys"]
    queries = torch.randn(2, 6, 2, 8, generator=torch.Generator().manual_seed(seed))
    budget = min(max(budget, 2), tokens)
    policy = Policy(budget, window=2, pool_width=1, budget_allocation="cake", graph=GRAPHS[graph])
    answer = select(keys, queries=queries, policy=policy)
    assert sum(layer.indices.shape[1] for layer in answer) == 2 * budget


@pytest.mark.parametrize("graph", GRAPHS)
@settings(max_examples=10, deadline=None)
@given(case=cases, order=st.permutations(range(3)))
def test_heads_in_another_order_give_their_answers_in_it(graph: str, case: tuple[int, int, int], order: list[int]) -> None:
    """Head granularity, tokens and pages: one head does not know the others, whatever group it came in."""
    seed, tokens, budget = case
    inputs = prompt(seed, tokens, padded=1)
    for kind in ("head", "pages"):
        policy = policy_of(kind, budget, GRAPHS[graph])
        turned = answered({role: array[:, order] for role, array in inputs.items()}, policy)
        for one, other in zip(answered(inputs, policy), turned, strict=True):
            assert [one.rows[head].tolist() for head in order] == [row.tolist() for row in other.rows]


@settings(max_examples=20, deadline=None)
@given(case=cases, strength=st.floats(0.1, 1))
def test_equal_sources_may_change_places(case: tuple[int, int, int], strength: float) -> None:
    """Two sources of one score and the same neighbors: their keys swapped, every other token's score stays."""
    seed, tokens, budget = case
    inputs = prompt(seed, tokens)
    keys, scores = inputs["keys"], inputs["scores"].abs() + 0.01
    scores[..., [0, 3]] = 9.0
    swapped = keys.clone()
    swapped[:, :, 0], swapped[:, :, 3] = keys[:, :, 3], keys[:, :, 0]
    graph = Graph(source_ratio=1.0, threshold=0.2, candidates=None, strength=strength)
    policy = policy_of("head", max(2, budget), graph)
    both = [answered({"keys": own, "scores": scores}, policy, outputs=["updated_scores"]) for own in (keys, swapped)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one.outputs["updated_scores"], other.outputs["updated_scores"], rtol=1e-5, atol=1e-7)
