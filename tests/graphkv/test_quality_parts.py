"""The quality benchmark's statistics, tasks and controls, without a model."""

import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import graphkv
from graphkv import Policy, Rope

pytest.importorskip("transformers", reason="the benchmark reads a real model")
BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
if BENCHMARKS not in sys.path:
    sys.path.append(BENCHMARKS)

from quality_rooms.choosing import Chooser  # noqa: E402
from quality_rooms.intervals import interval  # noqa: E402
from quality_rooms.judging import FULL, Record  # noqa: E402
from quality_rooms.methods import BASES, CONTROL, GRAPHS, Method, graph_of, methods  # noqa: E402
from quality_rooms.prefill import Prefilled, Prefiller  # noqa: E402
from quality_rooms.report import Run, tables  # noqa: E402
from quality_rooms.tasks import GROUPS, TASKS, Reader  # noqa: E402
from quality_rooms.texts import KINDS  # noqa: E402


class Words:
    """A tokenizer of white space, with a mark at the beginning."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {"<begin>": 0}

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [self.known.setdefault(word, len(self.known)) for word in text.replace(",", " , ").split()]
        return type("Encoded", (), {"input_ids": [0, *ids] if add_special_tokens else ids})


def reader(seed=3):
    return Reader(Words(), num_tokens=400, continuation=20, seed=seed)


def prefilled(tokens=150, layers=3, heads=2):
    chance = torch.Generator().manual_seed(5)
    keys = [torch.randn(heads, tokens, 8, generator=chance) for _ in range(layers)]
    queries = [torch.randn(heads * 2, tokens, 8, generator=chance) for _ in range(layers)]
    return Prefilled(None, tokens, keys, keys, queries)


ROPE = Rope(tuple(100.0 ** (-i / 4) for i in range(4)), 8)


def test_an_interval_is_of_the_mean_over_tasks_and_the_same_every_time() -> None:
    few, many = np.array([0.0, 1.0]), np.full(50, 3.0)
    found = interval([few, many], seed=1)
    assert found.mean == pytest.approx(1.75)  # tasks count alike, however many prompts they have
    assert (found.low, found.high) == (1.5, 2.0)
    assert found == interval([few, many], seed=1)
    assert found.excludes_zero


def test_an_interval_covers_what_it_says() -> None:
    chance = np.random.default_rng(0)
    covered = [
        abs((found := interval([chance.normal(size=80)], seed=0, draws=400)).mean) < 9 and found.low <= 0 <= found.high
        for _ in range(200)
    ]
    assert 0.88 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("tasks", [[], [np.array([])]])
def test_an_interval_of_nothing_is_refused(tasks) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        interval(tasks, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_long_and_always_the_same(kind) -> None:
    text = KINDS[kind]()
    assert len(text) > 300_000
    assert text == KINDS[kind]()


@pytest.mark.parametrize("name", TASKS)
def test_cases_follow_from_the_seed(name) -> None:
    first, again, other = (reader(seed).cases(name, 3) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert reader().cases(name, 5)[:3] == first  # more prompts leave the first ones as they are
    for case in first:
        assert case.ids[0] == 0
        assert len(case.ids) <= 400
        assert all(
            1 <= start < stop <= len(case.fed) for start, stop in case.spans
        )  # nothing is judged that the uncut prefill gave


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.exact])
def test_an_answer_is_told_once_and_asked_in_the_right_place(name) -> None:
    words = Words()
    case = Reader(words, num_tokens=400, continuation=20, seed=3).cases(name, 1)[0]
    back = {number: word for word, number in words.known.items()}
    context, fed = ([back[token] for token in part] for part in (case.ids, case.fed))
    assert ("Question:" in context[-32:]) == (TASKS[name].group == GROUPS[0])
    assert ("Question:" in fed) == (TASKS[name].group == GROUPS[1])
    for start, stop in case.spans:
        person, surname = fed[start - 1], fed[start:stop]
        told = [place for place in range(len(context) - 2) if context[place : place + 2] == ["Note:", person]]
        assert len(told) == 1
        assert context[told[0] + 2 : told[0] + 2 + len(surname)] == surname


def test_documents_do_not_overlap() -> None:
    made = reader()
    pieces = [tuple(made.piece("reference", prompt)) for prompt in range(made.pieces("reference"))]
    assert len(set(pieces)) > 0.9 * len(pieces)
    assert all(len(piece) == 420 for piece in pieces)


def test_every_scorer_of_the_catalogue_is_a_base() -> None:
    named = {method.base for method in methods(BASES)} - {None}
    assert named == {*graphkv.terms.catalogue.SCORERS, "pyramidkv"} - {"given"}


@pytest.mark.parametrize(
    ("graph", "policy"),
    [("sequential 0.1", Policy.sequential(70)), ("paper", Policy.paper(70, sinks=4)), (None, Policy.snapkv(70, sinks=4))],
)
def test_shared_scores_change_no_answer(graph, policy) -> None:
    given = prefilled()
    mine = Chooser(given, ROPE, device="cpu", seed="0").selected(Method("x", "snapkv", graph), 70)
    queries = [seen[:, -32:] for seen in given.queries]
    selection = graphkv.select(given.keys, queries=queries, policy=policy, rope=ROPE)
    assert all(torch.equal(left, right.long()) for left, right in zip(mine, selection.indices, strict=True))


ALSO = ["default strength=0.5 threshold=0.5 neighbors=3", "paper rounds=2 candidates=2", "sequential 0.1 similarity=post_rope"]


def test_a_graph_is_named_by_what_differs() -> None:
    found = graph_of("default strength=0.5 neighbors=null threshold=0.95 similarity=pre_rope")
    assert found == dataclasses.replace(Policy(1).graph, strength=0.5, threshold=0.95, similarity="pre_rope")
    assert graph_of("sequential 0.25").strength == 0.25
    assert graph_of(None) is None
    with pytest.raises(ValueError, match="begins with none of"):
        graph_of("defaults")
    with pytest.raises(graphkv.InvalidInputError, match="strength"):
        graph_of("default strength=2")


@pytest.mark.parametrize(("base", "budget"), [*((base, 70) for base in BASES), ("pyramidkv", 44)])
def test_the_choices_of_all_rows_together_are_those_of_select(base, budget) -> None:
    chooser = Chooser(prefilled(tokens=300, layers=2), ROPE, device="cpu", seed="0")
    asked = methods([base], ALSO)
    found = chooser.chosen_together(asked, budget)
    assert list(found) == [method.name for method in asked]
    for method in asked:
        for mine, selected in zip(found[method.name], chooser.selected(method, budget), strict=True):
            assert torch.equal(mine, selected), method.name


@pytest.mark.parametrize("method", methods(["snapkv", "pyramidkv"]), ids=lambda method: method.name)
def test_every_method_keeps_its_budget_with_the_sinks_and_the_window(method) -> None:
    given = prefilled(tokens=300)
    kept = Chooser(given, ROPE, device="cpu", seed="0").selected(method, 60)
    widths = [tokens.shape[1] for tokens in kept]
    assert widths == [60] * 3 if method.base != "pyramidkv" else sum(widths) <= 60 * 3
    always = {*range(4), *range(268, 300)}
    for head in (head for tokens in kept for head in tokens):
        assert always <= set(head.tolist())
        assert len(set(head.tolist())) == len(head)


def test_the_control_has_the_same_graph_on_other_tokens() -> None:
    given = prefilled()
    chooser = Chooser(given, ROPE, device="cpu", seed="0")
    right, shuffled, again = (
        chooser.selected(Method("x", "snapkv", name), 60) for name in ("sequential 0.1", CONTROL, CONTROL)
    )
    assert GRAPHS[CONTROL] == GRAPHS["sequential 0.1"]
    assert all(map(torch.equal, shuffled, again))
    assert not all(map(torch.equal, right, shuffled))
    keys, mixed = chooser._unrotated, chooser._shuffled(Method("x", "snapkv", CONTROL), 60)
    assert torch.equal(keys.sum(dim=2).round(decimals=3), mixed.sum(dim=2).round(decimals=3))  # the same keys, moved
    assert torch.equal(keys[:, :, :4], mixed[:, :, :4])
    assert torch.equal(keys[:, :, -32:], mixed[:, :, -32:])


def test_the_mask_shows_every_kept_token_and_no_later_one() -> None:
    held = torch.tensor([[True, True, True], [True, False, False]])
    mask = Prefiller._mask(held, 2)
    assert mask.int().tolist() == [[[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]], [[[1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]]]


def measured(prompts):
    chance = random.Random(0)
    records = []
    for task in TASKS:
        for prompt in range(prompts):
            hard = chance.random()
            records.append(Record(task, prompt, 0, FULL, 1.0, hard, 0.0))
            records.append(Record(task, prompt, 64, "snapkv", 0.5, hard + 0.5, 0.1))
            records.append(Record(task, prompt, 64, "snapkv + paper", 0.75, hard + 0.25, 0.1))
    return Run({"model": "none", "seed": 0}, records)


def test_a_run_survives_json_and_its_tables_show_paired_differences() -> None:
    run = measured(20)
    lines = list(tables(run))
    assert any("+25.0 [+25.0, +25.0]*" in line and "-0.250 [-0.250, -0.250]*" in line for line in lines)
    assert list(tables(Run.from_json(run.to_json()))) == lines


def test_few_prompts_prove_nothing() -> None:
    lines = list(tables(measured(4)))
    assert any(line.startswith("Fewer than 20 prompts a task") for line in lines)
    assert not any("]*" in line for line in lines)


def test_runs_of_several_seeds_are_taken_together() -> None:
    few, more = measured(4), measured(20)
    pooled = Run.pooled([few, more])
    assert pooled.about["seed"] == "0 + 0"
    assert pooled.prompts == 24
    task = next(iter(TASKS))
    both = np.concatenate([run.values(task, "snapkv", [64], "nll") for run in (few, more)])
    assert pooled.values(task, "snapkv", [64], "nll").tolist() == both.tolist()
