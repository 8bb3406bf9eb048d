"""graphkv.select against the float64 reference, by the rule at the end of docs/algorithm.md, over the whole space."""

import dataclasses

import numpy as np
import pytest
import torch
from graphkv_testing.cases import Case, Spec, coarse_corners, corners, expected, large, seeded, specs
from graphkv_testing.rule import judge_layer, judge_selection, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphkv import Graph, Policy, select
from graphkv.algorithm import Part, allocate, finish, narrow, select_layers
from graphkv.arrays import value_norms
from graphkv.budgets import plan_layers
from graphkv.layer import Layer

SEEDED = tuple(seeded(300))
CORNERS = (*corners(), *coarse_corners(), *expected())
ALL = (*CORNERS, *SEEDED)
BATCH = 30
ONE_SHOT = Graph(neighbors="auto", threshold=0.0, candidates=None)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads would only wait for each other. What their number changes has a test of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def judged(spec: Spec):
    case = Case(spec)
    return judge_selection(case.states(), select(**case.inputs(), outputs=case.outputs))


def rows(selection) -> list:
    return [rows_of(indices) for indices in selection.indices]


def figures(selection) -> list:
    return [(answer.kept_score_ratio, answer.changed) for answer in selection]


# --- right, by the rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", CORNERS, ids=lambda spec: spec.id)
def test_corner(spec):
    for verdict in judged(spec):
        assert verdict.ok, verdict.describe()


@pytest.mark.parametrize("first", range(0, len(SEEDED), BATCH), ids=lambda first: f"seeds-{first}-to-{first + BATCH - 1}")
def test_seeded(first):
    problems, exact = [], 0
    for spec in SEEDED[first : first + BATCH]:
        verdicts = judged(spec)
        exact += all(verdict.exact for verdict in verdicts)
        problems += [f"{spec.id}\n{verdict.describe()}" for verdict in verdicts if not verdict.ok]
    assert not problems, "\n\n".join(problems)
    assert exact >= 0.9 * BATCH, "too few cases have margins above the arithmetic's error: the rule would decide nothing"


@pytest.mark.parametrize("spec", large(), ids=lambda spec: spec.id)
def test_large(spec):
    for verdict in judged(spec):
        assert verdict.ok, verdict.describe()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(spec=specs())
def test_any_case(spec):
    for verdict in judged(spec):
        assert verdict.ok, verdict.describe()


@pytest.mark.parametrize("spec", [spec for spec in ALL if spec.importance == "none"][:12], ids=lambda spec: spec.id)
def test_ties_of_computed_norms_go_to_the_lower_index(spec):
    # Bit-equal keys have bit-equal norms, whatever order a row's squares are added in.
    case = Case(dataclasses.replace(spec, keys="duplicated"))
    for verdict in judge_selection(case.states(), select(**case.inputs()), exact_ties=True):
        assert verdict.ok, verdict.describe()


# --- the same answer, however it is asked -----------------------------------------------------------------------------


def test_outputs_change_no_answer():
    for spec in ALL[::4]:
        case = Case(spec)
        without, answer = select(**case.inputs()), select(**case.inputs(), outputs=case.outputs)
        assert rows(answer) == rows(without), spec.id
        assert figures(answer) == figures(without), spec.id
        assert not any(layer.outputs for layer in without)
        assert all(set(layer.outputs) == set(case.outputs) for layer in answer)


def layers_of(case: Case) -> list[Layer]:
    """As `select` makes them, with the budgets of their prompt."""
    n, spec = case.spec.tokens, case.spec
    plans = plan_layers(
        case.policy, num_tokens=n, num_layers=spec.layers, pinned=spec.pinned, caller_scores="scores" in case.arrays
    )
    layers = []
    for place, plan in enumerate(plans):
        own = {role: arrays[place] for role, arrays in case.arrays.items()}
        if "values" in own:
            own["value_norms"] = value_norms(own.pop("values"))
        layers.append(Layer(plan, **own, rope=case.rope))
    return allocate(layers)


def finished(answers: list, sizes: list[int]) -> list:
    """Answers of prompts of so many layers each, with the parts of a shared one joined."""
    left, joined = iter(answers), []
    for size in sizes:
        own = [next(left) for _ in range(size)]
        joined += [finish(own)] if isinstance(own[0], Part) else own
    return joined


def test_neighbours_in_the_batch_do_not_matter():
    cases = [Case(spec) for spec in SEEDED[:60]]
    alone = [select(**case.inputs()) for case in cases]
    work, sizes = [layer for case in cases for layer in layers_of(case)], [case.spec.layers for case in cases]
    together = finished(select_layers(work), sizes)
    backwards = finished(select_layers(work[::-1])[::-1], sizes)
    wanted = [answer for selection in alone for answer in selection]
    for answers in (together, backwards):
        for want, got in zip(wanted, answers, strict=True):
            assert rows_of(got.indices) == rows_of(want.indices)
            assert (got.kept_score_ratio, got.changed) == (want.kept_score_ratio, want.changed)


def test_narrowed_is_the_same_as_whole():
    count = 0
    for case in map(Case, ALL[::2]):
        layers = layers_of(case)
        work = [layer for layer in layers if layer.plan.candidates is not None]
        if case.policy.granularity == "model" and len(work) < len(layers):
            continue
        count += len(work)
        sizes = [len(work)] if case.policy.granularity == "model" else [1] * len(work)
        answers = (finished(select_layers(own), sizes) for own in (work, [narrow(layer) for layer in work]))
        for whole, narrowed in zip(*answers, strict=True):
            assert rows_of(narrowed.indices) == rows_of(whole.indices), case.spec.id
            assert (narrowed.kept_score_ratio, narrowed.changed) == (whole.kept_score_ratio, whole.changed), case.spec.id
    assert count > 50


def test_a_batch_of_prompts_is_the_prompts_one_by_one():
    names = {spec.id: spec for spec in ALL}
    first = next(spec for spec in names.values() if spec.name == "sequential-default")
    prompts = [
        Case(dataclasses.replace(first, tokens=n, layers=n % 3 + 1, seed=n, kv_heads=n % 2 + 1)) for n in (65, 19, 33, 7)
    ]
    given = [case.inputs() for case in prompts]
    batch = select(
        [one["keys"] for one in given],
        queries=[one["queries"] for one in given],
        policy=prompts[0].policy,
        pinned=[[(1, 3)], None, [], [(0, 1), (5, 7)]],
        rope=prompts[0].rope,
    )
    for one, pinned, answer in zip(given, [[(1, 3)], None, [], [(0, 1), (5, 7)]], batch, strict=True):
        alone = select(**{**one, "pinned": pinned})
        assert rows(answer) == rows(alone)
        assert figures(answer) == figures(alone)


def test_layers_as_a_list_or_stacked():
    for spec in ALL[::3]:
        case = Case(spec)
        assert rows(select(**case.inputs(stacked=False))) == rows(select(**case.inputs())), spec.id


def test_thread_counts_do_not_change_bits():
    chosen = [Case(spec) for spec in (*ALL[::4], *large())]
    answers = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        selections = [select(**case.inputs()) for case in chosen]
        answers.append([(rows(selection), figures(selection)) for selection in selections])
    assert answers[0] == answers[1]


def test_numpy_and_strided_inputs_and_nhd_give_the_same():
    for spec in ALL[1::5]:
        case = Case(spec)
        inputs = case.inputs()
        wanted = rows(select(**inputs))
        if spec.dtype != "bf16":
            plain = {name: value.numpy() if torch.is_tensor(value) else value for name, value in inputs.items()}
            answer = select(**plain)
            assert all(isinstance(row, np.ndarray) for layer in answer for row in layer.rows), spec.id
            assert rows(answer) == wanted, spec.id
        strided = dict(inputs)
        wide = torch.full((*inputs["keys"].shape[:-1], 2 * spec.head_dim), torch.nan, dtype=inputs["keys"].dtype)
        wide[..., ::2] = inputs["keys"]
        strided["keys"] = wide[..., ::2]
        assert rows(select(**strided)) == wanted, spec.id
        nhd = dict(inputs)
        for role in {"keys", "queries", "similarity_keys", "values"} & set(inputs):
            nhd[role] = inputs[role].transpose(1, 2)
        assert rows(select(**nhd, layout="NHD")) == wanted, spec.id


# --- properties -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(spec=specs(graph=None, rope=None), graph=st.sampled_from(["strength", "source_ratio", "rounds", "sequential"]))
def test_a_graph_that_cannot_change_anything_is_no_graph(spec, graph):
    still = {
        "strength": Graph(strength=0.0),
        "source_ratio": Graph(source_ratio=0.0),
        "rounds": Graph(rounds=0),
        "sequential": Graph(update="sequential", strength=0.0),
    }[graph]
    inputs = Case(spec).inputs()
    base = select(**inputs)
    other = select(**{**inputs, "policy": dataclasses.replace(inputs["policy"], graph=still)})
    assert rows(other) == rows(base)
    assert figures(other) == figures(base)
    assert not any(other.changed)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(spec=specs())
def test_answers_are_ascending_and_as_wide_as_they_should_be(spec):
    case = Case(spec)
    selection = select(**case.inputs())
    scores = case.arrays.get("scores")
    for layer, (state, answer) in enumerate(zip(case.states(), selection, strict=True)):
        assert answer.layer == layer
        assert 0.0 <= answer.kept_score_ratio <= 1.0 + 1e-6
        own = rows_of(answer.indices)
        units, room = spec.tokens, min(state.budget, spec.tokens)
        if case.policy.page_size is not None:
            units = -(-spec.tokens // case.policy.page_size)
            room = units if state.keeps_all else min(units, max(1, state.budget // case.policy.page_size))
        if case.policy.budget_allocation == "adaptive_heads":
            assert sum(map(len, own)) <= len(own) * room
            room = units
        for head, row in enumerate(own):
            assert row == sorted(set(row))
            assert all(0 <= unit < units for unit in row)
            assert len(row) <= room
            padded = scores is not None and bool(torch.isneginf(torch.stack(scores)).any())
            if not padded and case.policy.budget_allocation != "adaptive_heads":
                assert len(row) == room, head
        if torch.is_tensor(answer.indices):
            assert answer.indices.dtype == torch.int32


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_sequential_answers_nest_as_the_budget_grows(seed, strength):
    # All candidates and no always-kept tokens: a larger budget only goes on where the smaller one stopped.
    spec = Spec(tokens=41, importance="scores", policy=(("budget", 1), ("scorer", "given")), seed=seed, keys="duplicated")
    inputs = Case(spec).inputs()
    graph = Graph(update="sequential", strength=strength, candidates=None)
    kept = [set() for _ in range(spec.kv_heads)]
    for budget in range(1, 41):
        answer = rows(select(**{**inputs, "policy": Policy(budget, scorer="given", graph=graph)}))[0]
        for head, row in enumerate(answer):
            assert kept[head] < set(row)
            kept[head] = set(row)


def test_permuting_kv_heads_permutes_the_answer():
    for spec in (spec for spec in ALL if spec.kv_heads == 3):
        policy = spec.make_policy()
        if policy.granularity != "head" or policy.budget_allocation in ("cake", "adaptive_heads") or policy.scorer == "tova":
            continue  # sums over all heads are taken in their order
        inputs = Case(spec).inputs()
        turn = [2, 0, 1]
        moved = dict(inputs)
        for role in {"keys", "similarity_keys", "scores"} & set(inputs):
            moved[role] = inputs[role][:, turn]
        for role in {"queries", "attention"} & set(inputs):
            moved[role] = inputs[role].unflatten(1, (3, spec.group))[:, turn].flatten(1, 2)
        if "positions" in inputs and inputs["positions"].ndim == 3:
            moved["positions"] = inputs["positions"][:, turn]
        wanted = [[layer[head] for head in turn] for layer in rows(select(**inputs))]
        assert rows(select(**moved)) == wanted, spec.id


@pytest.mark.parametrize("update", ["product", "sequential"])
def test_a_shift_of_negative_scores_changes_nothing(update):
    graph = ONE_SHOT if update == "product" else Graph(update="sequential", strength=0.5, candidates=2)
    spec = Spec(tokens=47, importance="scores", policy=(("budget", 11), ("scorer", "given")), seed=5)
    inputs = {**Case(spec).inputs(), "policy": Policy(11, scorer="given", graph=graph)}
    eighths = torch.round(inputs["scores"] * 8) / 8  # exact under every shift below
    answers = [rows(select(**{**inputs, "scores": eighths - eighths.amax() - shift})) for shift in (0.0, 1.0, 64.0)]
    assert answers[0] == answers[1] == answers[2]


def test_knorm_decays_lookalikes_of_the_shortest_keys():
    # Unshifted, a negative score times a factor below 1 would rise: the copies of the best would be kept, not dropped.
    keys = torch.eye(8)[None, None] * torch.arange(1.0, 9.0)[:, None]
    keys[0, 0, 1] = 2 * torch.eye(8)[0]
    policy = Policy(2, scorer="knorm", graph=ONE_SHOT)
    assert select(keys, policy=policy).indices[0].tolist() == [[0, 2]]
    assert select(keys, policy=dataclasses.replace(policy, graph=None)).indices[0].tolist() == [[0, 1]]


# --- the documents' own example -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["product", "additive"])
def test_the_papers_worked_example(update, worked_example):
    inputs, state = worked_example(update)
    selection = select(**inputs)
    assert selection.indices[0].tolist() == [[1, 3, 6]]  # tokens 2, 4, 7 of the figure, which counts from 1
    assert judge_layer(state, selection.indices[0]).exact
