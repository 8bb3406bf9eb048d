"""The rule at the end of docs/algorithm.md ("A faster implementation is right when ..."), as a judge of kept sets.

`judge_layer` asks of every row: can float32 arithmetic, within the bounds of `graphkv_testing.bounds`, have led to this
set? Where all margins are above those bounds only the reference's own set passes (`RowVerdict.exact`). Where some are not:

- candidates and sources whose place at the cut (C, K) is open are tried both ways;
- one-shot: each edge that is open (threshold, m-th place, snap) is taken as suits the set, and no kept token's largest
  possible updated score may be below the smallest possible one of a dropped token;
- sequential: the set is replayed in float64, each time with a kept token that no remaining token certainly precedes in x.

Ties that any arithmetic must find equal (the caller's own scores, exact zeros) are decided by the index, and checked so.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphkv_testing.bounds import UNIT, Scores, edge_bounds, gamma, score_bounds
from graphkv_testing.open_orders import Outcome, judge_order, replay, updated_before
from graphkv_testing.states import GraphState, LayerState, RowState

__all__ = ["LayerVerdict", "RowVerdict", "judge_layer", "judge_row", "judge_selection", "rows_of"]

MOST_WORLDS = 512  # ways to decide open candidates and sources that are tried; with more, some right set might be refused


@dataclass
class RowVerdict:
    """ok: the set can be right. exact: it is the only one that can. problem: why not, for a person."""

    ok: bool
    exact: bool
    problem: str = ""


@dataclass
class LayerVerdict:
    """The verdicts of a layer's rows, and what is wrong with its own figures."""

    layer: int
    rows: list[RowVerdict]
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems and all(row.ok for row in self.rows)

    @property
    def exact(self) -> bool:
        """Every row had only one right answer."""
        return all(row.exact for row in self.rows)

    def describe(self) -> str:
        """What is wrong, a paragraph a row."""
        return "\n".join([*self.problems, *(row.problem for row in self.rows if not row.ok)])


def judge_selection(states: Sequence[LayerState], selection: Any, *, exact_ties: bool = False) -> list[LayerVerdict]:
    """A whole `graphkv.Selection` against the reference's layers."""
    verdicts = []
    for state, answer in zip(states, selection, strict=True):
        verdict = judge_layer(
            state,
            answer.indices,
            kept_score_ratio=answer.kept_score_ratio,
            changed=answer.changed,
            exact_ties=exact_ties,
        )
        if answer.num_tokens != state.rows[0].num_tokens:
            verdict.problems.append(f"layer {state.layer}: num_tokens {answer.num_tokens} is not {state.rows[0].num_tokens}")
        verdicts.append(verdict)
    return verdicts


def judge_layer(
    state: LayerState,
    indices: Any,
    *,
    kept_score_ratio: float | None = None,
    changed: int | None = None,
    exact_ties: bool = False,
) -> LayerVerdict:
    """One layer's answer. `indices`: [Hkv, B] of any array kind, or a list of rows; figures are checked where given.

    `exact_ties`: scores that the implementation computes are held to the reference's bit-equal ties as well.
    """
    kept = rows_of(indices)
    verdict = LayerVerdict(state.layer, [])
    if len(kept) != len(state.rows):
        verdict.problems.append(f"layer {state.layer}: {len(kept)} rows for {len(state.rows)} KV heads")
        return verdict
    bounds = [score_bounds(state, row, exact_ties=exact_ties) for row in state.rows]
    verdict.rows = [judge_row(state, row, chosen, bound) for row, chosen, bound in zip(state.rows, kept, bounds, strict=True)]
    if all(row.ok for row in verdict.rows):
        verdict.problems += _judge_figures(state, kept, bounds, kept_score_ratio, changed)
    return verdict


def rows_of(indices: Any) -> list[list[int]]:
    """Indices of any array kind, or a list of rows, as plain lists."""
    return [[int(token) for token in row] for row in indices]


def judge_row(state: LayerState, row: RowState, kept: Sequence[int], scores: Scores) -> RowVerdict:
    """One row's kept set, ascending, always-kept tokens included."""
    problem = _shape_problem(row, kept)
    if problem:
        return RowVerdict(False, False, _report(state, row, kept, problem))
    chosen = set(kept) - set(row.always)
    if row.num_tokens <= row.budget or len(row.contenders) == len(chosen):
        return RowVerdict(True, True)
    if row.graph is None:
        before = scores.before(row.contenders)
        return _verdict(state, row, kept, [judge_order(row.contenders, before, chosen)])
    graph = state.policy.graph
    edges = edge_bounds(state, row, threshold=graph.threshold)
    # The reference's own world first: it is one of the allowed, and often enough where many are (tokens with zero keys).
    own = (sorted(row.graph.candidates), sorted(row.graph.sources))
    worlds = [own, *(world for world in itertools.islice(_worlds(state, row, scores), MOST_WORLDS) if world != own)]
    outcomes = []
    for candidates, sources in worlds:
        if graph.update == "sequential":
            outcome = replay(scores, edges, candidates, chosen, graph.strength)
        else:
            before = updated_before(row, scores, edges, candidates, sources, graph)
            outcome = judge_order(candidates, before, chosen)
        outcomes.append(outcome)
        if outcome.ok:
            break
    return _verdict(state, row, kept, outcomes, worlds=len(worlds))


# --- the shape of an answer ---------------------------------------------------------------------------------------------


def _shape_problem(row: RowState, kept: Sequence[int]) -> str:
    width = len(row.always) + min(row.contended, len(row.contenders))
    if list(kept) != sorted(set(kept)):
        return "not ascending, or a token twice"
    if len(kept) != width:
        return f"{len(kept)} tokens where {width} are to be kept"
    if not set(row.always) <= set(kept):
        return f"always-kept tokens missing: {sorted(set(row.always) - set(kept))}"
    if not set(kept) <= set(row.always) | set(row.contenders):
        return f"kept, but no contenders: {sorted(set(kept) - set(row.always) - set(row.contenders))}"
    return ""


# --- what arithmetic leaves open ----------------------------------------------------------------------------------------


def _worlds(state: LayerState, row: RowState, scores: Scores) -> Iterator[tuple[list[int], list[int]]]:
    """Every (candidates, sources) that the bounds allow, the reference's own first where it is certain."""
    graph, ran = state.policy.graph, row.graph
    for candidates in _tops(row.contenders, scores.before(row.contenders), len(ran.candidates)):
        if graph.update == "sequential":
            yield candidates, []
            continue
        for sources in _tops(candidates, scores.before(candidates), len(ran.sources)):
            yield candidates, sources


def _tops(tokens: Sequence[int], before: np.ndarray, count: int) -> Iterator[list[int]]:
    """Every set of the `count` first tokens that the partial order `before` allows."""
    inside, open_ones = _cut(tokens, before, count)
    place = {j: i for i, j in enumerate(tokens)}
    for some in itertools.combinations(open_ones, count - len(inside)):
        rest = np.array([place[j] for j in open_ones if j not in some], dtype=int)
        if not before[np.ix_(rest, np.array([place[j] for j in some], dtype=int))].any():
            yield sorted([*inside, *some])


def _cut(tokens: Sequence[int], before: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    """Tokens certainly among the first `count`, and those that may be."""
    others = len(tokens) - 1
    after, ahead = before.sum(axis=1), before.sum(axis=0)
    inside = [j for i, j in enumerate(tokens) if others - after[i] < count]
    open_ones = [j for i, j in enumerate(tokens) if others - after[i] >= count and ahead[i] < count]
    return inside, open_ones


# --- verdicts, and their words ----------------------------------------------------------------------------------------


def _verdict(state: LayerState, row: RowState, kept: Sequence[int], outcomes: list[Outcome], *, worlds: int = 1) -> RowVerdict:
    if any(outcome.ok for outcome in outcomes):
        return RowVerdict(True, worlds == 1 and outcomes[0].exact)
    return RowVerdict(False, False, _report(state, row, kept, outcomes[0].problem))


def _report(state: LayerState, row: RowState, kept: Sequence[int], problem: str) -> str:
    lines = [
        f"layer {state.layer}, KV head {row.head}: {problem}",
        f"  n {row.num_tokens}, B {row.budget}, A {len(row.always)}, B_sel {row.contended}, contenders {len(row.contenders)}",
        f"  kept      {list(kept)}",
        f"  reference {row.kept}",
    ]
    graph = row.graph
    lines += [f"  missing   {_token(row, graph, j)}" for j in row.kept if j not in kept]
    lines += [f"  too many  {_token(row, graph, j)}" for j in kept if j not in row.kept and 0 <= j < row.num_tokens]
    if graph is not None:
        lines.append(f"  C {len(graph.candidates)}, K {len(graph.sources)}, sources {graph.sources}, order {graph.order}")
    return "\n".join(lines)


def _token(row: RowState, graph: GraphState | None, j: int) -> str:
    text = f"{j}: base {row.base[j]:.9g}, shifted {row.shifted[j]:.9g}"
    if graph is None or math.isnan(graph.updated[j]):
        return text
    touching = [f"{i} ({graph.edges[i, j]:.9g})" for i, near in zip(graph.sources, graph.neighbours, strict=True) if j in near]
    return f"{text}, updated {graph.updated[j]:.9g}" + (f", near sources {', '.join(touching)}" if touching else "")


def _judge_figures(
    state: LayerState, kept: list[list[int]], bounds: list[Scores], ratio: float | None, changed: int | None
) -> list[str]:
    """kept_score_ratio and changed, for the sets that were kept, within the same bounds."""
    problems = []
    rows = [(row, set(chosen) - set(row.always), bound) for row, chosen, bound in zip(state.rows, kept, bounds, strict=True)]
    if ratio is not None:
        wanted, wide = 1.0, 0.0
        if not state.keeps_all:
            total = sum(row.shifted[j] for row, _, _ in rows for j in row.contenders)
            error = sum(bound.shifted[1][j] - bound.shifted[0][j] for row, _, bound in rows for j in row.contenders) / 2
            if total > 0:
                wanted = sum(row.shifted[j] for row, chosen, _ in rows for j in chosen) / total
                wide = 2 * error / total + gamma(sum(len(row.contenders) for row, _, _ in rows)) + 2 * UNIT
        if not abs(ratio - wanted) <= wide:
            problems.append(f"layer {state.layer}: kept_score_ratio {ratio!r} is not {wanted!r} within {wide:.1e}")
    if changed is not None:
        least, most = 0, 0
        for row, chosen, bound in rows if not state.keeps_all and state.rows[0].graph is not None else []:
            inside, open_ones = _cut(row.contenders, bound.before(row.contenders), row.contended)
            free = len(chosen & set(open_ones))
            taken = min(row.contended, len(row.contenders)) - len(inside)
            surely = len(chosen - set(inside) - set(open_ones))
            least, most = least + surely + max(0, free - taken), most + surely + min(free, len(open_ones) - taken)
        if not least <= changed <= most:
            problems.append(f"layer {state.layer}: changed {changed} is not {least}" + (f" to {most}" if most > least else ""))
    return problems
