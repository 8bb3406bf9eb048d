"""The words all floors share: policies, ropes, always-kept tokens, budgets, errors."""

import pickle
import subprocess
import sys
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphkv.budgets import plan_layers
from graphkv.terms import catalogue, errors
from graphkv.terms.always_kept import always_kept, count
from graphkv.terms.errors import GraphKVError, InvalidInputError, Reason
from graphkv.terms.policy import Graph, Policy
from graphkv.terms.rope import Rope
from graphkv.terms.selection import LayerSelection


@pytest.mark.parametrize(("fields", "argument"), [
    ({"budget": 0}, "budget"), ({"budget": -1}, "budget"), ({"budget": True}, "budget"), ({"budget": 0.0}, "budget"),
    ({"budget": 1.5}, "budget"), ({"budget": float("nan")}, "budget"), ({"budget": "512"}, "budget"), ({"budget": None}, "budget"),
    ({"scorer": "h3o"}, "scorer"), ({"scorer": None}, "scorer"), ({"budget_allocation": "cone"}, "budget_allocation"),
    ({"window": 0}, "window"), ({"window": -1, "scorer": "knorm"}, "window"), ({"window": 1.0}, "window"), ({"window": True}, "window"),
    ({"pool_width": 4}, "pool_width"), ({"pool_width": 0}, "pool_width"), ({"pool_width": 1025}, "pool_width"), ({"pooling": "sum"}, "pooling"), ({"sinks": -1}, "sinks"),
    ({"granularity": "token"}, "granularity"), ({"page_align": 0}, "page_align"), ({"graph": "paper"}, "graph"),
])  # fmt: skip
def test_a_bad_policy_names_its_field(fields: dict[str, object], argument: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Policy(**{"budget": 512, **fields})
    assert caught.value.argument == argument
    named = argument in ("scorer", "budget_allocation", "pooling", "granularity")
    assert caught.value.reason == (Reason.UNKNOWN_NAME if named else Reason.BAD_POLICY)
    assert argument in str(caught.value)
    assert "must be" in str(caught.value)


@pytest.mark.parametrize(("fields", "argument"), [
    ({"source_ratio": 1.1}, "source_ratio"), ({"source_ratio": float("nan")}, "source_ratio"), ({"strength": -0.1}, "strength"),
    ({"neighbors": 0}, "neighbors"), ({"neighbors": "all"}, "neighbors"), ({"threshold": 0.0}, "threshold"), ({"threshold": 2}, "threshold"),
    ({"candidates": 0.5}, "candidates"), ({"candidates": float("inf")}, "candidates"), ({"similarity": "rope"}, "similarity"),
    ({"rounds": 65}, "rounds"), ({"rounds": 1.0}, "rounds"), ({"signal": "boost"}, "signal"), ({"update": "sum"}, "update"),
    ({"update": "additive", "rounds": 2}, "rounds"), ({"update": "sequential", "signal": "evict"}, "signal"),
])  # fmt: skip
def test_a_bad_graph_names_its_field(fields: dict[str, object], argument: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Graph(**fields)
    assert caught.value.argument == f"graph.{argument}"


def test_the_type_of_a_budget_decides() -> None:
    assert Policy(1).tokens(1000) == 1
    assert Policy(1.0).tokens(1000) == 1000
    assert Policy(0.3).tokens(10) == 3
    assert Policy(1e-9).tokens(10) == 1


def test_the_named_settings() -> None:
    assert Policy.paper(64).graph == Graph(neighbors="auto", threshold=0.0, candidates=None)
    assert Policy.paper(64, rounds=3).graph.rounds == 3
    sequential = Policy.sequential(64)
    assert (sequential.sinks, sequential.graph.update, sequential.graph.similarity) == (4, "sequential", "pre_rope")
    assert (sequential.graph.strength, sequential.graph.candidates, sequential.needs_rope) == (0.1, 2.0, True)
    assert Policy.snapkv(64).graph is None
    assert Policy.pyramidkv(64).budget_allocation == "pyramid"
    assert Policy.sequential(64, sinks=0, window=16).sinks == 0


def test_fingerprints_are_stable() -> None:
    """A changed default, or another way to write it down, needs a new prefix: these stand for good."""
    assert Policy(512).fingerprint == "9b8996ef41dc329f"
    assert Policy.sequential(512).fingerprint == "f59b058ce33492c0"
    assert Policy(512, page_size=16, granularity="layer", combine="max").fingerprint == "6fd90cb592e68404"
    assert Policy(512, granularity="model").fingerprint == "e483645af74e68e7"
    assert Policy(512, budget_allocation="cake", options={"tau2": 0.4}).fingerprint == "9839df8789c334da"
    assert Policy(512, budget_allocation="adaptive_heads", options={"alpha": 0.5}).fingerprint == "1668e81ea9d01723"
    assert Policy(512, budget_allocation="cake", options={"tau1": 1.6}) == Policy(512, budget_allocation="cake")
    assert Policy(512, pool_width=7, sinks=0, pooling="avg", graph=Graph(strength=1)).fingerprint == Policy(512).fingerprint
    others = [Policy(512, window=32), Policy(513), Policy(0.5), Policy(512, graph=None), Policy(512, graph=Graph(strength=0.5))]
    assert len({policy.fingerprint for policy in (Policy(512), *others)}) == len(others) + 1


@st.composite
def graphs(draw: st.DrawFn, signals: tuple[str, ...] = tuple(sorted(catalogue.SIGNALS))) -> Graph:
    update = draw(st.sampled_from(sorted(catalogue.UPDATES)))
    return Graph(
        source_ratio=draw(st.floats(0, 1)),
        neighbors=draw(st.one_of(st.none(), st.just("auto"), st.integers(1, 9))),
        threshold=draw(st.floats(0.1, 1)),
        candidates=draw(st.one_of(st.none(), st.floats(1, 64))),
        similarity=draw(st.sampled_from(sorted(catalogue.SIMILARITIES))),
        rounds=1 if update == "additive" else draw(st.integers(0, 64)),
        strength=draw(st.floats(0, 1)),
        signal="decay" if update == "sequential" else draw(st.sampled_from(signals)),
        update=update,
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Every field, in the combinations that are allowed."""
    allocation = draw(st.sampled_from(sorted(catalogue.BUDGETS)))
    scorer = draw(st.sampled_from(sorted(set(catalogue.SCORERS) - ({"given"} if allocation == "cake" else set()))))
    coarse = {"adaptive_heads": ("head",), "uniform": ("head", "layer", "model")}.get(allocation, ("head", "layer"))
    granularity = draw(st.sampled_from(coarse))
    paged = () if allocation == "adaptive_heads" else ("page_size", "page_align")
    page = draw(st.sampled_from(("", *paged)))
    window = st.integers(1 if allocation == "cake" else catalogue.SCORERS[scorer].least_window, 100)
    by_default = allocation != "cake" or catalogue.SCORERS[scorer].window > 0
    named = {"scorer": scorer, "budget_allocation": allocation}
    options = {
        name: draw(st.floats(terms.least, min(terms.most, 1e6)))
        for name, terms in catalogue.OPTIONS.items()
        if named[terms.of[0]] == terms.of[1] and draw(st.booleans())
    }
    return Policy(
        budget=draw(st.one_of(st.integers(1, 10**6), st.floats(1e-6, 1))),
        window=draw(st.one_of(st.none(), window) if by_default else window),
        pool_width=draw(st.one_of(st.none(), st.sampled_from([1, 3, 7]))),
        pooling=draw(st.sampled_from(sorted(catalogue.POOLINGS))),
        sinks=draw(st.one_of(st.none(), st.integers(0, 9))),
        granularity=granularity,
        combine=draw(st.sampled_from(sorted(catalogue.COMBINES))),
        graph=draw(st.one_of(st.none(), graphs() if granularity == "head" else graphs(("decay", "enhance")))),
        options=options,
        **named,
        **({page: draw(st.integers(1, 64))} if page else {}),
    )


@given(policies())
def test_a_policy_survives_its_dict(policy: Policy) -> None:
    again = Policy.from_dict(policy.to_dict())
    assert again == policy
    assert again.fingerprint == policy.fingerprint
    assert pickle.loads(pickle.dumps(policy)) == policy


@pytest.mark.parametrize(("fields", "argument"), [
    ({"page_size": 4, "page_align": 4}, "page_align"),
    ({"granularity": "model", "budget_allocation": "pyramid"}, "budget_allocation"),
    ({"granularity": "model", "budget_allocation": "cake"}, "budget_allocation"),
    ({"granularity": "model", "budget_allocation": "adaptive_heads"}, "budget_allocation"),
    ({"granularity": "layer", "budget_allocation": "adaptive_heads"}, "granularity"),
    ({"page_size": 4, "budget_allocation": "adaptive_heads"}, "page_size"),
    ({"page_align": 4, "budget_allocation": "adaptive_heads"}, "page_align"),
    ({"scorer": "given", "window": 8, "budget_allocation": "cake"}, "scorer"),
    ({"scorer": "knorm", "budget_allocation": "cake"}, "window"),
    ({"scorer": "h2o", "window": 0, "budget_allocation": "cake"}, "window"),
    ({"granularity": "layer", "graph": Graph(signal="evict")}, "granularity"),
    ({"granularity": "model", "graph": Graph(signal="evict")}, "granularity"),
    ({"options": {"alpha": 0.3}}, "options"), ({"options": {"tau1": 1.0}, "budget_allocation": "pyramid"}, "options"),
    ({"options": {"gamma": 1.0}, "budget_allocation": "cake"}, "options"),
    ({"options": {"alpha": 1.1}, "budget_allocation": "adaptive_heads"}, "options.alpha"),
    ({"options": {"tau1": 0.0}, "budget_allocation": "cake"}, "options.tau1"),
    ({"options": {"tau2": float("inf")}, "budget_allocation": "cake"}, "options.tau2"),
    ({"options": {"gamma": -1.0}, "scorer": "cake"}, "options.gamma"),
    ({"page_size": 0}, "page_size"), ({"page_size": 1.0}, "page_size"), ({"page_size": True}, "page_size"), ({"combine": "sum"}, "combine"),
])  # fmt: skip
def test_what_one_field_forbids_another_is_named(fields: dict[str, object], argument: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Policy(**{"budget": 512, **fields})
    assert caught.value.argument == argument
    assert argument in str(caught.value)


def test_what_the_words_forbid_elsewhere_is_allowed_where_they_do_not_apply() -> None:
    """Of each forbidden pair, its nearest allowed neighbor."""
    assert Policy(9, page_size=4, graph=Graph(signal="evict")).is_coarse
    assert Policy(9, granularity="layer", page_align=4, budget_allocation="pyramid").is_coarse
    assert Policy(9, granularity="layer", page_size=4, budget_allocation="cake").needs_all_layers
    assert Policy(9, granularity="model", page_size=4).needs_all_layers
    assert Policy(9, scorer="knorm", window=1, budget_allocation="cake", options={"tau1": 1}).option("tau1") == 1.0
    assert not Policy(9, budget_allocation="adaptive_heads", graph=Graph(signal="evict")).is_coarse


def test_equal_policies_are_those_that_choose_alike() -> None:
    assert Policy(1) != Policy(1.0)
    assert len({Policy(1), Policy(1.0)}) == 2
    assert Policy(64, pool_width=7) == Policy(64)
    assert hash(Policy(64, pool_width=7)) == hash(Policy(64))
    assert Policy(64) != 64


def test_from_dict_names_what_it_does_not_know() -> None:
    for fields in (None, {}, {"budget": 5, "depth": 3}, {"budget": 5, "graph": {"depth": 3}}):
        with pytest.raises(InvalidInputError):
            Policy.from_dict(fields)


@given(st.integers(1, 60), st.integers(1, 70), st.lists(st.tuples(st.integers(0, 59), st.integers(1, 9)), max_size=3),
       st.integers(0, 70), st.integers(0, 70))  # fmt: skip
def test_always_kept_fills_in_its_order(
    tokens: int, budget: int, pinned: list[tuple[int, int]], sinks: int, window: int
) -> None:
    ranges = [(start, min(start + length, tokens)) for start, length in pinned if start < tokens]
    order = [token for start, stop in ranges for token in range(start, stop)]
    pins = set(order)
    order += [*range(min(sinks, tokens)), *range(tokens - 1, tokens - 1 - min(window, tokens), -1)]
    if tokens > budget and len(pins) > budget:
        with pytest.raises(InvalidInputError, match="pinned"):
            always_kept(tokens, budget, pinned=ranges, sinks=sinks, window=window)
        return
    kept = always_kept(tokens, budget, pinned=ranges, sinks=sinks, window=window)
    assert list(kept) == sorted(kept)
    wanted = set(range(tokens)) if tokens <= budget else set(list(dict.fromkeys(order))[:budget])
    assert {token for start, stop in kept for token in range(start, stop)} == wanted
    assert count(kept) == len(wanted)


def test_always_kept_of_a_billion_tokens_is_ranges() -> None:
    pinned = tuple((token, token + 1) for token in range(0, 400_000, 100))
    kept = always_kept(2**31 - 1, 2**30, pinned=pinned, sinks=2**29, window=2**30)
    assert count(kept) == 2**30
    assert kept == ((0, 2**29), (2**31 - 1 - 2**29, 2**31 - 1))


def test_pyramid_by_hand() -> None:
    budgets = [plan.budget for plan in plan_layers(Policy.pyramidkv(132), num_tokens=1000, num_layers=5)]
    assert budgets == [227, 180, 133, 86, 39]  # P = 100: low 5, high 195, step 47, on top of the window's 32
    assert [plan.budget for plan in plan_layers(Policy.pyramidkv(132), num_tokens=199, num_layers=5)] == [132] * 5
    tight = [plan.budget for plan in plan_layers(Policy.pyramidkv(132), num_tokens=212, num_layers=2)]
    assert tight == [212, 52]  # high is all of n - 32 = 180, low the rest of 2P


def test_page_align_drops_whole_pages() -> None:
    plans = plan_layers(Policy(100, page_align=16), num_tokens=1001, num_layers=1)
    assert plans[0].budget == 105
    assert (1001 - plans[0].budget) % 16 == 0


def everything(kind: type[GraphKVError]) -> list[type[GraphKVError]]:
    return [kind, *(below for own in kind.__subclasses__() for below in everything(own))]


@pytest.mark.parametrize("kind", everything(GraphKVError), ids=lambda kind: kind.__name__)
def test_every_error_pickles(kind: type[GraphKVError]) -> None:
    error = kind("no", reason="X", retryable=True, argument="keys", retry_after=1.5, request_id="r")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), vars(again)) == (str(error), vars(error))
    assert kind("no").reason in set(Reason)


def test_the_tree_stands_in_its_docstring() -> None:
    for kind in everything(GraphKVError):
        assert kind.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize(
    "arguments", [((1.0,), 3), ((1.0,), 4), ((1.0, float("inf")), 4), ((), 0), (("x",), 2), ((1.0,), True)], ids=str
)
def test_a_bad_rope_is_refused(arguments: tuple[tuple[float, ...], int]) -> None:
    with pytest.raises(InvalidInputError, match="rope"):
        Rope(*arguments)


def test_the_terms_need_the_standard_library_alone() -> None:
    program = "import sys, graphkv; assert not {'torch', 'numpy', 'grpc', 'google'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


class Row(list[int]):
    """Stands for an array: `tolist` is all that selections ask of one."""

    def tolist(self) -> list[int]:
        return list(self)


@given(
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.sets(st.integers(0, n - 1)), min_size=1, max_size=3))
    ),
    st.sampled_from(["front", "tail"]),
)
def test_moves_close_the_gaps_in_place(prompt: tuple[int, list[set[int]]], to: Literal["front", "tail"]) -> None:
    tokens, heads = prompt
    answer = LayerSelection(0, [Row(sorted(kept)) for kept in heads], tokens, 1.0, 0, "scores", "")
    for kept, moves, dropped in zip(heads, answer.moves(to), answer.dropped(), strict=True):
        cache = list(range(tokens))
        for source, destination in moves:
            assert source != destination
            assert (destination <= source) == (to == "front")
            cache[destination] = cache[source]
        left = cache[: len(kept)] if to == "front" else cache[tokens - len(kept) :]
        assert left == sorted(kept)
        assert {token for start, stop in dropped for token in range(start, stop)} == set(range(tokens)) - kept


def test_shared_answers_and_pages_are_rows_of_tokens() -> None:
    """Pages of 4 of 10 tokens, of which the last has 2; one row where heads share the answer."""
    pages = LayerSelection(0, [Row([0, 2]), Row([1, 2])], 10, 1.0, 0, "scores", "", page_size=4)
    assert pages.rows == [[0, 2], [1, 2]]
    assert pages.kept_ranges() == [[(0, 4), (8, 10)], [(4, 10)]]
    assert pages.dropped() == [[(4, 8)], [(0, 4)]]
    assert pages.moves() == [[(8, 4), (9, 5)], [(token, token - 4) for token in range(4, 10)]]
    assert pages.moves("tail") == [[(3, 7), (2, 6), (1, 5), (0, 4)], []]
    for granularity in ("layer", "model"):
        shared = LayerSelection(0, Row([1, 2, 5]), 7, 1.0, 0, "scores", "", granularity=granularity)
        assert shared.rows == [[1, 2, 5]]
        assert shared.kept_ranges() == [[(1, 3), (5, 6)]]
        assert shared.dropped() == [[(0, 1), (3, 5), (6, 7)]]
        assert shared.moves() == [[(1, 0), (2, 1), (5, 2)]]
        both = LayerSelection(0, Row([0, 1]), 7, 1.0, 0, "scores", "", granularity=granularity, page_size=4)
        assert both.kept_ranges() == [[(0, 7)]]
        assert both.dropped() == both.moves("tail") == [[]]


def test_moves_go_to_one_of_two_ends() -> None:
    with pytest.raises(InvalidInputError, match="front"):
        LayerSelection(0, [], 1, 1.0, 0, "scores", "").moves("middle")  # type: ignore[arg-type]
