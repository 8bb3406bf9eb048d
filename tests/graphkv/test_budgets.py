"""Plans of many layers and many pinned ranges: each layer's always-kept tokens are its own, worked out once and shared."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from graphkv import Policy, budgets
from graphkv.budgets import plan_layers
from graphkv.terms.always_kept import always_kept, merge
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
