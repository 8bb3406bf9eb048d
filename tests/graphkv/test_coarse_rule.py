"""The rule has teeth for shared answers, pages, votes, shared budgets and outputs as well; see tests/graphkv/test_rule.py."""

import math

import graphkv_testing.adaptive as adaptive
import graphkv_testing.budgets_reference as budgets
import graphkv_testing.coarse as coarse
import graphkv_testing.importance as importance
import graphkv_testing.outputs_reference as outputs
import numpy as np
import pytest
from graphkv_testing.cases import Case, coarse_corners, expected, seeded
from graphkv_testing.coarse import page_tokens
from graphkv_testing.rule import judge_layer
from graphkv_testing.states import CoarseState, LayerState, Paging, RowState

CATALOGUE = ("keep_mask", "dropped_ranges", "moves", "updated_scores", "decay_factors", "choice_order")
SEEDED = tuple(seeded(1000))
SPECS = (*coarse_corners(), *expected(), *(spec for spec in SEEDED[:360] if spec.shares))


def kept(state):
    return state.answer[0] if state.policy.granularity != "head" else state.answer


def answered(case, state):
    """The reference's answer with all that it can hold, as the library would give it."""
    tokens = outputs.kept_tokens(state)
    made = {
        "keep_mask": lambda: outputs.keep_mask(tokens, state.num_tokens),
        "dropped_ranges": lambda: np.array(outputs.dropped_ranges(tokens, state.num_tokens), dtype=np.int32).reshape(-1, 3),
        "moves": lambda: np.array(outputs.moves(tokens), dtype=np.int32).reshape(-1, 3),
        "updated_scores": lambda: outputs.updated_scores(state).astype(np.float32),
        "decay_factors": lambda: outputs.decay_factors(state).astype(np.float32),
        "choice_order": lambda: outputs.choice_order(state).astype(np.int32),
    }
    given = {name: made[name]() for name in case.outputs}
    if state.policy.granularity != "head":
        given |= {name: given[name][0] for name in ("keep_mask", "updated_scores")}
    return {
        "indices": kept(state),
        "kept_score_ratio": state.kept_score_ratio,
        "changed": state.changed,
        "outputs": given,
    }


def judged(state, answer):
    return judge_layer(state, **answer)


def test_the_references_own_answers_pass_and_nearly_all_are_decided():
    cases, decided = 0, 0
    for spec in (*SPECS, *SEEDED[:300]):
        case = Case(spec)
        verdicts = [judged(state, answered(case, state)) for state in case.states()]
        for verdict in verdicts:
            assert verdict.ok, f"{spec.id}\n{verdict.describe()}"
        cases += 1
        decided += all(verdict.exact for verdict in verdicts)
    assert decided >= 0.95 * cases, (decided, cases)


def other_answers(state, rng):
    """The answer with one of its tokens, or pages, exchanged, a few times; between heads where they share a budget."""
    own = [list(row) for row in state.answer]
    if isinstance(state, CoarseState):
        always = state.layers[0].rows[0].always if state.paging is None else state.paging.always
        able = [
            set(shared.contenders) - set(always)
            if state.paging is None
            else {j // state.paging.size for j in shared.contenders} - set(always)
            for shared in state.shared
        ]
    else:
        always, able = state.rows[0].always, [set(row.candidates) for row in state.rows]
    inside = [(place, unit) for place, row in enumerate(own) for unit in row if unit not in always]
    outside = [(place, unit) for place, units in enumerate(able) for unit in sorted(units) if unit not in own[place]]
    if isinstance(state, CoarseState):
        outside = [(place, unit) for place, unit in outside if any(row == place for row, _ in inside)]
    if not inside or not outside:
        return
    for _ in range(3):
        place, unit = outside[int(rng.integers(len(outside)))]
        leaving = inside if isinstance(state, LayerState) else [pair for pair in inside if pair[0] == place]
        gone, left = leaving[int(rng.integers(len(leaving)))]
        other = [[kept for kept in row if (at, kept) != (gone, left)] for at, row in enumerate(own)]
        other[place] = sorted([*other[place], unit])
        yield other


def test_an_exact_verdict_means_that_no_other_set_passes():
    rng, tried = np.random.default_rng(3), {"shared": 0, "pages": 0, "votes": 0, "adaptive_heads": 0}
    for spec in SPECS:
        for state in Case(spec).states():
            heads = state.policy.budget_allocation == "adaptive_heads"
            if state.keeps_all or not (heads or isinstance(state, CoarseState)) or not judge_layer(state, kept(state)).exact:
                continue
            for other in other_answers(state, rng):
                indices = other[0] if state.policy.granularity != "head" else other
                assert not judge_layer(state, indices).ok, spec.id
                kind = "adaptive_heads" if heads else "pages" if state.paging else "shared"
                tried["votes" if not heads and state.shared[0].votes else kind] += 1
    assert min(tried.values()) >= 25, tried


def bent(given):
    """One number of it changed, or None where none is finite."""
    flat = given.copy().reshape(-1)
    finite = np.flatnonzero(np.isfinite(flat))
    if not finite.size:
        return None
    where = int(finite[-1])
    flat[where] = (
        ~flat[where] if flat.dtype == bool else flat[where] + 1 if flat.dtype == np.int32 else flat[where] * 1.01 + 0.01
    )
    return flat.reshape(given.shape)


def test_outputs_and_figures_are_judged():
    tried, missed = dict.fromkeys(CATALOGUE, 0), dict.fromkeys(CATALOGUE, 0)
    for spec in (*SPECS, *SEEDED[:80]):
        case = Case(spec)
        for state in case.states():
            answer = answered(case, state)
            if state.keeps_all:
                continue
            for name, given in answer["outputs"].items():
                assert given.size == 0 or not judged(state, {**answer, "outputs": {name: given[..., :-1]}}).ok
                wrong = bent(given)
                if wrong is not None:
                    tried[name] += 1
                    missed[name] += judged(state, {**answer, "outputs": {name: wrong}}).ok
            if judged(state, answer).exact:
                assert not judged(state, {**answer, "kept_score_ratio": state.kept_score_ratio + 0.01}).ok
    assert min(tried.values()) >= 20, tried
    assert all(missed[name] <= 0.02 * tried[name] for name in tried), missed  # where arithmetic leaves a number open


# --- misreadings -----------------------------------------------------------------------------------------------------------


def _patched(where, name, wrong):
    label = getattr(wrong, "fget", wrong).__name__
    return pytest.param(where, name, wrong, id=f"{where.__name__.rpartition('.')[2]}-{name}-{label}")


def ignoring_padding(rows, combine, combined=coarse.combined):
    values = np.ma.masked_invalid(rows)
    return np.ma.filled(values.max(axis=0) if combine == "max" else values.mean(axis=0), -math.inf)


def always_the_mean(rows, combine, combined=coarse.combined):
    return combined(rows, "mean")


def of_base_scores(row):
    return np.where(np.isin(np.arange(row.num_tokens), row.contenders), row.base, -math.inf)


def outside_unshifted(row, values=RowState.values.fget):
    given = values(row)
    others = [j for j in row.contenders if j not in row.candidates]
    given[others] = row.base[others]
    return given


def of_candidates_alone(row, values=RowState.values.fget):
    given = values(row)
    given[[j for j in row.contenders if j not in row.candidates]] = -math.inf
    return given


def shifted_without_a_graph(row, values=RowState.values.fget):
    given = values(row)
    if row.graph is None:
        given[row.contenders] = row.shifted[row.contenders]
    return given


def ties_by_index(rows, picks, votes=coarse.votes):
    counts, sums = votes(rows, picks)
    return counts, 0 * sums


def ties_over_all_contenders(rows, picks, votes=coarse.votes):
    counts, _ = votes(rows, picks)
    return counts, sum(np.where(np.isneginf(row.base), 0.0, row.shifted) for row in rows)


def only_voted_ones(rows, picks, votes=coarse.votes):
    counts, sums = votes(rows, picks)
    return np.where(counts == 0, -math.inf, counts), sums


def rounded_up(policy, num_tokens, budget, *, pinned=(), window=0, paging=budgets.paging):
    own = paging(policy, num_tokens, budget, pinned=pinned, window=window)
    return own and Paging(own.size, max(own.count, -(-min(num_tokens, budget) // own.size)), own.always)


def partial_page_competes(policy, num_tokens, budget, *, pinned=(), window=0, paging=budgets.paging):
    own = paging(policy, num_tokens, budget, pinned=pinned, window=window)
    if own is None or num_tokens <= budget or not num_tokens % own.size or window:
        return own
    last = num_tokens // own.size
    pinned_there = any(stop > last * own.size for _, stop in pinned)
    return own if pinned_there else Paging(own.size, own.count, [page for page in own.always if page != last])


def divided_by_the_page(row, values, ties, paging, combine, *, by_votes, taken=coarse.taken):
    if paging is not None and combine == "mean" and not by_votes:
        scaled, able = values.copy(), np.flatnonzero(values > -math.inf)
        for page in range(-(-row.num_tokens // paging.size)):
            inside = [j for j in page_tokens(page, paging.size, row.num_tokens) if j in able]
            scaled[inside] *= len(inside) / paging.size
        values = scaled
    return taken(row, values, ties, paging, combine, by_votes=by_votes)


def safe_of_contenders_alone(policy, budget, always):
    return max(0, math.floor(dict(policy.options).get("alpha", 0.2) * budget + 1e-9))


def nobody_is_safe(policy, budget, always):
    return 0


def without_taus(weights, contended, most, shares=budgets.cake_shares):
    return shares([1.0 if weight else 0.0 for weight in weights], contended, most)


def uncapped(weights, contended, most, shares=budgets.cake_shares):
    return shares(weights, contended, 10**6)


def remainder_in_order(weights, contended, most, shares=budgets.cake_shares):
    total, parts = len(weights) * contended, shares(weights, contended, most)
    if not any(weights) or max(parts) == most:
        return parts
    floors = [math.floor(total * weight / sum(weights)) for weight in weights]
    return [own + (layer < total - sum(floors)) for layer, own in enumerate(floors)]


def variance_of_all(received, figures=budgets.cake_figures):
    entropy, _ = figures(received)
    return entropy, float(received.reshape(-1, received.shape[-1]).var(axis=0, ddof=1).sum())


def mean_of_keys(keys, keydiff=importance._keydiff):
    means = keys.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(keys, axis=-1) * np.linalg.norm(means, axis=-1)
    return -(keys * means).sum(axis=-1) / np.where(norms > 0, norms, 1.0), np.ones(keys.shape[:2])


def population_variance(attention, kv_heads, width, pooling, gamma, cake=importance._cake):
    window = attention.shape[1]
    return cake(attention, kv_heads, width, pooling, gamma * (window - 1) / window)


def without_covariance(keys, mean, covariance, values, expected=importance._expected_attention):
    return expected(keys, mean, 0 * covariance, values)


MUTANTS = (
    _patched(coarse, "combined", ignoring_padding),
    _patched(coarse, "combined", always_the_mean),
    _patched(RowState, "values", property(of_base_scores)),
    _patched(RowState, "values", property(outside_unshifted)),
    _patched(RowState, "values", property(of_candidates_alone)),
    _patched(RowState, "values", property(shifted_without_a_graph)),
    _patched(coarse, "votes", ties_by_index),
    _patched(coarse, "votes", ties_over_all_contenders),
    _patched(coarse, "votes", only_voted_ones),
    _patched(budgets, "paging", rounded_up),
    _patched(budgets, "paging", partial_page_competes),
    _patched(coarse, "taken", divided_by_the_page),
    _patched(adaptive, "safe_count", safe_of_contenders_alone),
    _patched(adaptive, "safe_count", nobody_is_safe),
    _patched(budgets, "cake_shares", without_taus),
    _patched(budgets, "cake_shares", uncapped),
    _patched(budgets, "cake_shares", remainder_in_order),
    _patched(budgets, "cake_figures", variance_of_all),
    _patched(importance, "_keydiff", mean_of_keys),
    _patched(importance, "_cake", population_variance),
    _patched(importance, "_expected_attention", without_covariance),
)


@pytest.mark.parametrize(("where", "name", "wrong"), MUTANTS)
def test_a_wrong_reading_is_found(where, name, wrong, monkeypatch):
    for spec in (*SPECS, *SEEDED):
        case = Case(spec)
        right = case.states()
        with monkeypatch.context() as patch:
            patch.setattr(where, name, wrong)
            mistaken = case.states()
            own = [kept(state) for state in mistaken]
        if not all(judge_layer(state, other).ok for state, other in zip(right, own, strict=True)):
            return
    pytest.fail("no case tells it from the right one")


def test_the_cases_reach_what_they_are_for():
    counts = dict.fromkeys(("layer", "model", "pages", "votes", "adaptive_heads", "cake", "changed", "partial", "larger"), 0)
    for spec in SPECS:
        for state in Case(spec).states():
            counts["changed"] += state.changed > 0
            counts["cake"] += state.cake is not None and len(set(state.cake.shares)) > 1
            counts["adaptive_heads"] += isinstance(state, LayerState) and len(set(map(len, state.answer))) > 1
            if isinstance(state, CoarseState) and not state.keeps_all:
                counts["votes"] += state.shared[0].votes
                counts["layer"] += state.policy.granularity == "layer"
                counts["model"] += state.policy.granularity == "model"
                if state.paging is not None:
                    counts["pages"] += state.paging.count > len(state.paging.always)
                    counts["partial"] += state.num_tokens % state.paging.size > 0
                    counts["larger"] += state.paging.size > state.budget
    assert min(counts.values()) >= 20, counts
    assert 0.4 <= sum(spec.shares for spec in SEEDED) / len(SEEDED) <= 0.6
