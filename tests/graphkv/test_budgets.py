"""Plans of many layers and many pinned ranges: each layer's always-kept tokens are its own, worked out once and shared."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from graphkv import Policy, budgets
from graphkv.budgets import LayerPlan, allocated_plans, plan_layers
from graphkv.terms.always_kept import always_kept, always_kept_pages, merge
from graphkv.terms.errors import InvalidInputError


@given(
    tokens=st.integers(1, 300),
    layers=st.integers(1, 6),
    budget=st.integers(1, 320),
    window=st.integers(1, 40),
    sinks=st.integers(0, 9),
    pinned=st.lists(st.tuples(st.integers(0, 299), st.integers(1, 20)), max_size=4),
    allocation=st.sampled_from(["uniform", "pyramid"]),
    align=st.sampled_from([None, 16]),
)
def test_shared_ranges_are_those_of_each_layer_alone(
    tokens: int,
    layers: int,
    budget: int,
    window: int,
    sinks: int,
    pinned: list[tuple[int, int]],
    allocation: str,
    align: int | None,
) -> None:
    policy = Policy(
        budget, scorer="knorm", window=window, sinks=sinks, budget_allocation=allocation, page_align=align, graph=None
    )
    ranges = merge([(start, min(start + size, tokens)) for start, size in pinned if start < tokens])
    window = policy.observation_window(caller_scores=False)
    try:
        plans = plan_layers(policy, num_tokens=tokens, num_layers=layers, pinned=ranges)
    except InvalidInputError:
        assert sum(stop - start for start, stop in ranges) > min(budget, tokens - 1)
        return
    for plan in plans:
        assert plan.always == always_kept(tokens, plan.budget, pinned=ranges, sinks=sinks, window=window)


@pytest.mark.parametrize("allocation", ["uniform", "pyramid"])
def test_layers_share_one_computation(allocation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def counted(num_tokens: int, budget: int, **given: object) -> object:
        computed.append(budget)
        return always_kept(num_tokens, budget, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(budgets, "always_kept", counted)
    policy = Policy(20_000, scorer="knorm", budget_allocation=allocation, graph=None)
    pinned = [(4 * place, 4 * place + 1) for place in range(4096)]
    plans = plan_layers(policy, num_tokens=2**20, num_layers=2**10, pinned=pinned)
    assert len({plan.budget for plan in plans}) == (1 if allocation == "uniform" else 2**10)
    assert len({id(plan.always) for plan in plans}) == len(computed) == 1


# --- shares of a total, by hand: 8 tokens a layer beside a window of 2, of 14 tokens: at most 12 a layer -------------------


def waiting(layers: int, tokens: int = 14, **fields: object) -> tuple[LayerPlan, ...]:
    policy = Policy(10, window=2, budget_allocation="cake", graph=None, **fields)
    plans = plan_layers(policy, num_tokens=tokens, num_layers=layers)
    assert not any(plan.allocated for plan in plans)
    assert {plan.budget for plan in plans} == {10}
    return plans


@pytest.mark.parametrize(("weights", "shares"), [
    ([1.0, 2.0, 3.0], [4, 8, 12]), ([1e-300, 2e-300, 3e-300], [4, 8, 12]),
    ([3.0, 2.0, 2.0], [10, 7, 7]),       # 10.3, 6.9, 6.9: the remainder to the largest fractions
    ([5.0, 5.0, 6.0], [8, 7, 9]),        # 7.5, 7.5, 9: ties to the lower layer
    ([1.0, 3.0, 20.0], [3, 9, 12]),      # 8 above the cap, shared again as 1 to 3
    ([1.0, 3.0, 4.0, 40.0], [3, 7, 10, 12]),  # 1, 2, 3, 26; the 14 again as 1.75, 5.25, 7
    ([0.0, 1.0, 9.0, 90.0], [0, 8, 12, 12]),  # 0, 0, 3, 29; 17 again as 0, 2, 15; 6 of them again: no weight, no share
    ([0.0, 0.0, 7.0], [6, 6, 12]),       # until only layers without weight have room
    ([0.0, 0.0, 0.0], [8, 8, 8]),        # all zero: uniform
    ([2.5], [8]),
])  # fmt: skip
def test_cake_shares_by_hand(weights: list[float], shares: list[int]) -> None:
    plans = allocated_plans(waiting(len(weights)), weights)
    assert [plan.budget - 2 for plan in plans] == shares
    assert all(plan.allocated for plan in plans)
    assert [plan.layer for plan in plans] == list(range(len(weights)))
    for plan in plans:
        assert plan.always == (((0, 14),) if plan.budget == 14 else ((12, 14),))
        assert plan.contended == (0 if plan.budget == 14 else plan.budget - 2)


def test_cake_budgets_are_aligned_and_paged_after_the_shares() -> None:
    aligned = allocated_plans(waiting(3, tokens=50, page_align=8), [1.0, 2.0, 3.0])
    assert [plan.budget for plan in aligned] == [10, 10, 18]  # from 6, 10, 14: 50 less 5, 5, 4 pages
    paged = allocated_plans(waiting(3, tokens=50, page_size=4), [1.0, 2.0, 3.0])
    assert [(plan.budget, plan.page_count, plan.always_pages) for plan in paged] == [
        (6, 1, (12,)), (10, 2, (12,)), (14, 3, (12,)),
    ]  # fmt: skip


def test_cake_waits_for_nothing_where_nothing_competes() -> None:
    policy = Policy(10, window=10, budget_allocation="cake", graph=None)
    for tokens in (10, 50):  # all tokens, or the window alone
        assert all(plan.allocated for plan in plan_layers(policy, num_tokens=tokens, num_layers=3))


@given(
    tokens=st.integers(4, 200),
    budget=st.integers(3, 150),
    weights=st.lists(st.one_of(st.just(0.0), st.floats(0, 1e30), st.floats(0, 1)), min_size=1, max_size=6),
)
def test_cake_keeps_the_total_within_the_caps_and_in_order(tokens: int, budget: int, weights: list[float]) -> None:
    policy = Policy(budget, window=2, budget_allocation="cake", graph=None)
    plans = plan_layers(policy, num_tokens=tokens, num_layers=len(weights))
    if plans[0].allocated:
        return
    shares = [plan.budget - 2 for plan in allocated_plans(plans, weights)]
    assert sum(shares) == len(weights) * (budget - 2)
    assert all(0 <= share <= tokens - 2 for share in shares)
    for one, (weight, share) in enumerate(zip(weights, shares, strict=True)):
        for other in range(one + 1, len(weights)):
            if weight == weights[other]:
                assert 0 <= share - shares[other] <= len(weights)  # a remainder a round at most, the lower layer first
            else:
                assert (weight > weights[other]) == (share > shares[other]) or abs(share - shares[other]) <= len(weights)


# --- pages kept whatever their score --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pages", "kept"), [
    (1, (5,)), (2, (0, 5)), (3, (0, 1, 5)), (4, (0, 1, 5, 10)), (5, (0, 1, 5, 9, 10)), (6, (0, 1, 5, 8, 9, 10)),
    (7, (0, 1, 5, 8, 9, 10)), (11, tuple(range(11))),
])  # fmt: skip
def test_pages_fill_in_the_order_of_always_kept(pages: int, kept: tuple[int, ...]) -> None:
    """42 tokens in pages of 4: pinned 22 (page 5), sinks 0 to 4 (0, 1), window 34 to 41 (from the end 10, 9, 8)."""
    assert always_kept_pages(42, pages, 4, pinned=[(22, 23)], sinks=5, window=8) == kept


def test_the_last_partial_page_is_kept_and_comes_last() -> None:
    assert always_kept_pages(10, 2, 4) == (2,)
    assert always_kept_pages(10, 2, 4, sinks=1) == (0, 2)
    assert always_kept_pages(10, 1, 4, sinks=1) == (0,)
    assert always_kept_pages(10, 2, 4, window=3) == (1, 2)
    assert always_kept_pages(10, 1, 4, window=3) == (2,)
    assert always_kept_pages(8, 1, 4) == ()
    assert always_kept_pages(10, 3, 4) == (0, 1, 2)


def test_pinned_pages_above_the_budget_are_an_error() -> None:
    assert always_kept_pages(40, 2, 4, pinned=[(3, 5)]) == (0, 1)
    with pytest.raises(InvalidInputError, match="pinned") as caught:
        always_kept_pages(40, 1, 4, pinned=[(3, 5)])
    assert caught.value.argument == "pinned"
    with pytest.raises(InvalidInputError, match="2 pages"):
        plan_layers(Policy(7, page_size=4, graph=None), num_tokens=40, num_layers=2, pinned=[(3, 5)])


@given(
    tokens=st.integers(1, 60),
    pages=st.integers(1, 12),
    size=st.integers(1, 9),
    pinned=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 9)), max_size=3),
    sinks=st.integers(0, 70),
    window=st.integers(0, 70),
)
def test_always_kept_pages_are_those_of_the_tokens_in_order(
    tokens: int, pages: int, size: int, pinned: list[tuple[int, int]], sinks: int, window: int
) -> None:
    ranges = [(start, min(start + length, tokens)) for start, length in pinned if start < tokens]
    pins = list(dict.fromkeys(token // size for start, stop in ranges for token in range(start, stop)))
    order = [*pins, *(token // size for token in range(min(sinks, tokens)))]
    order += [token // size for token in range(tokens - 1, tokens - 1 - min(window, tokens), -1)]
    order += [tokens // size] if tokens % size else []
    whole = -(-tokens // size)
    if whole > pages and len(pins) > pages:
        with pytest.raises(InvalidInputError, match="pinned"):
            always_kept_pages(tokens, pages, size, pinned=ranges, sinks=sinks, window=window)
        return
    kept = always_kept_pages(tokens, pages, size, pinned=ranges, sinks=sinks, window=window)
    wanted = range(whole) if whole <= pages else sorted(list(dict.fromkeys(order))[:pages])
    assert list(kept) == list(wanted)


@pytest.mark.parametrize(("budget", "size", "tokens", "count"), [
    (8, 4, 40, 2), (11, 4, 40, 2), (3, 4, 40, 1), (1, 64, 40, 1), (40, 4, 40, 10), (64, 4, 42, 11), (9, None, 40, 0),
])  # fmt: skip
def test_the_number_of_pages(budget: int, size: int | None, tokens: int, count: int) -> None:
    plan = plan_layers(Policy(budget, scorer="knorm", page_size=size), num_tokens=tokens, num_layers=1)[0]
    assert plan.page_count == count
