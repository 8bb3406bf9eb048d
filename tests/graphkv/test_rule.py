"""The rule that judges the library has teeth: other sets fail it, and so does every plausible misreading of the text."""

import dataclasses
import math

import graphkv_testing.budgets_reference as budgets
import graphkv_testing.graph_steps as graph_steps
import graphkv_testing.importance as importance
import graphkv_testing.reference as reference
import numpy as np
import pytest
from graphkv_testing.cases import Case, Spec, corners, seeded
from graphkv_testing.rule import judge_layer

SPECS = (*corners(), *seeded(200))


def kept(state):
    return [row.kept for row in state.rows]


def test_an_exact_verdict_means_that_no_other_set_passes():
    rng, tried = np.random.default_rng(3), 0
    for spec in SPECS[::2]:
        for state in Case(spec).states():
            verdict = judge_layer(state, kept(state), kept_score_ratio=state.kept_score_ratio, changed=state.changed)
            assert verdict.ok, f"{spec.id}\n{verdict.describe()}"
            for row, exact in zip(state.rows, verdict.rows, strict=True):
                inside = [token for token in row.kept if token not in row.always]
                outside = [token for token in row.contenders if token not in row.kept]
                if exact.exact and inside and outside and not state.keeps_all:
                    other = sorted({*row.kept} - {rng.choice(inside)} | {rng.choice(outside)})
                    sets = [other if each is row else each.kept for each in state.rows]
                    assert not judge_layer(state, sets).ok, spec.id
                    tried += 1
    assert tried > 100


def test_the_shape_of_an_answer_is_judged():
    state = Case(Spec(kv_heads=1)).states()[0]
    right = state.rows[0].kept
    for wrong in (
        right[:-1],
        right[::-1],
        [right[0], *right],
        [-1, *right[1:]],
        [right[0] + 1 - right[0] % 2, *right[1:-1], 99],
    ):
        assert not judge_layer(state, [wrong]).ok
    assert not judge_layer(state, [right, right]).ok
    assert not judge_layer(state, [right], kept_score_ratio=state.kept_score_ratio * 1.001).ok
    assert not judge_layer(state, [right], changed=state.changed + 1).ok


# --- misreadings ---------------------------------------------------------------------------------------------------------


def _patched(name, wrong, module=reference):
    return pytest.param(module, name, wrong, id=f"{module.__name__.rpartition('.')[2]}-{name}-{wrong.__name__}")


def unclamped(cosine):
    return np.where(cosine >= graph_steps.SNAP, 1.0, cosine)


def unsnapped(cosine):
    return np.clip(cosine, 0.0, 1.0 - 2.0**-15)


def higher_index_first(tokens, values):
    return sorted(tokens, key=lambda j: (-values[j], -j))


def one_source_more(graph, budget, contended):
    return min(max(1, math.floor(graph.source_ratio * budget)) + 1, contended)


def sources_by_contended(graph, budget, contended):
    return min(max(1, math.floor(graph.source_ratio * contended + 1e-9)), contended) if graph.source_ratio else 0


def only_once(score, touching, graph, update=graph_steps._updated):
    return update(score, touching, graph if graph.update == "additive" else dataclasses.replace(graph, rounds=1))


def product_always(score, touching, graph, update=graph_steps._updated):
    return update(score, touching, dataclasses.replace(graph, update="product"))


def not_unrotated(keys, _positions, _rope):
    return keys


def unrotated_by_index(keys, _positions, rope, turn=graph_steps.unrotated):
    return turn(keys, np.arange(len(keys)), rope)


def rotated_twice(keys, positions, rope, turn=graph_steps.unrotated):
    return turn(keys, -positions, rope)


def never_interleaved(keys, positions, rope, turn=graph_steps.unrotated):
    return turn(keys, positions, dataclasses.replace(rope, interleaved=False))


def window_of_the_scorer_always(policy, *, caller_scores):
    return policy.observation_window(caller_scores=False)


def padding_not_counted(values, width, pooling, pool=importance.pooled):
    if pooling == "max":
        return pool(values, width, pooling)
    return pool(values, width, pooling) / np.maximum(pool(np.ones(len(values)), width, pooling), 1e-9)


def unpooled(values, width, pooling):
    return values


def unshifted(*of, start=reference._start_row):
    row = start(*of)
    row.shifted = row.base.copy()
    return row


def without_logs_of_the_score(value, log=graph_steps._log):
    return log(value) if value < 1 else 0.0


MUTANTS = (
    _patched("clamped", unclamped, graph_steps),
    _patched("clamped", unsnapped, graph_steps),
    _patched("best_first", higher_index_first, graph_steps),
    _patched("_source_count", one_source_more, graph_steps),
    _patched("_source_count", sources_by_contended, graph_steps),
    _patched("_updated", only_once, graph_steps),
    _patched("_updated", product_always, graph_steps),
    _patched("unrotated", not_unrotated),
    _patched("unrotated", unrotated_by_index),
    _patched("unrotated", rotated_twice),
    _patched("unrotated", never_interleaved),
    _patched("window_of", window_of_the_scorer_always, budgets),
    _patched("_start_row", unshifted),
    _patched("_log", without_logs_of_the_score, graph_steps),
    _patched("pooled", padding_not_counted, importance),
    _patched("pooled", unpooled, importance),
)


@pytest.mark.parametrize(("module", "name", "wrong"), MUTANTS)
def test_a_wrong_reading_is_found(module, name, wrong, monkeypatch):
    """Every plausible misreading of the text fails the rule in some case: the cases reach it, the bounds do not hide it."""
    for spec in SPECS:
        case = Case(spec)
        right = case.states()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            mistaken = case.states()
        if not all(judge_layer(state, kept(other)).ok for state, other in zip(right, mistaken, strict=True)):
            return
    pytest.fail("no case tells it from the right one")


def test_the_cases_reach_what_they_are_for():
    counts = dict.fromkeys(("changed", "ragged", "keeps_all", "overflow", "neighbours", "snapped", "zero", "sequential"), 0)
    for spec in SPECS:
        for state in Case(spec).states():
            counts["keeps_all"] += state.keeps_all
            counts["changed"] += state.changed > 0
            counts["ragged"] += len({len(row.kept) for row in state.rows}) > 1
            for row in state.rows:
                counts["overflow"] += row.contended == 0
                if row.graph is not None:
                    counts["neighbours"] += any(map(len, row.graph.neighbours))
                    counts["snapped"] += bool((np.triu(row.graph.edges, 1) == 1.0).any())
                    counts["zero"] += bool((row.cosine.diagonal() == 0.0).any())
                    counts["sequential"] += bool(row.graph.steps)
    assert min(counts.values()) >= 5, counts
