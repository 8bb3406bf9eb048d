"""Answers that rows share, or that name pages: combining updated scores, votes, and the choice of tokens or pages.

Part of the reference; takes layers whose rows have been through the graph.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from graphkv.terms.policy import Policy
from graphkv_testing.graph_steps import best_first
from graphkv_testing.states import CoarseState, LayerState, Paging, RowState, Shared

__all__ = ["coarse_states", "combined", "page_tokens", "taken", "votes"]


def coarse_states(layers: Sequence[LayerState], pagings: Sequence[Paging | None]) -> list[CoarseState]:
    """The answers of all layers of one prompt: one a layer, or with the granularity model one for all."""
    policy = layers[0].policy
    if policy.granularity == "model":
        return [_answer(layers, pagings[0], by_head=False)]
    by_head = policy.granularity == "head"
    return [_answer([state], paging, by_head=by_head) for state, paging in zip(layers, pagings, strict=True)]


def _answer(layers: Sequence[LayerState], paging: Paging | None, *, by_head: bool) -> CoarseState:
    members = [(state, row) for state in layers for row in state.rows]  # layer by layer, head by head
    groups = [[member] for member in members] if by_head else [members]
    shared = [_shared(group, layers[0].policy, paging) for group in groups]
    answer = CoarseState(layers[0].layer, list(layers), shared, paging, 1.0, 0)
    if not answer.keeps_all:
        answer.kept_score_ratio = _ratio(shared)
        answer.changed = sum(_changed(own) for own in shared)
    return answer


def _shared(members: list[tuple[LayerState, RowState]], policy: Policy, paging: Paging | None) -> Shared:
    rows = [row for _, row in members]
    graph = rows[0].graph
    by_votes = graph is not None and policy.graph is not None and policy.graph.update == "sequential"
    if by_votes:
        values, ties = votes(rows, [row.graph.order for row in rows if row.graph is not None])
        base, base_ties = votes(rows, [best_first(row.candidates, row.base)[: row.contended] for row in rows])
    else:
        ties = base_ties = np.zeros(rows[0].num_tokens)
        values = combined([row.values for row in rows], policy.combine)
        base = combined([_of(row.contenders, row.base) for row in rows], policy.combine)
    units, kept = taken(rows[0], values, ties, paging, policy.combine, by_votes=by_votes)
    _, base_kept = taken(rows[0], base, base_ties, paging, policy.combine, by_votes=by_votes)
    contenders = [int(j) for j in np.flatnonzero(values > -math.inf)]
    return Shared(members, by_votes, contenders, values, ties, kept, units, base_kept)


def _of(tokens: Sequence[int], values: np.ndarray) -> np.ndarray:
    own = np.full(len(values), -math.inf)
    own[list(tokens)] = values[list(tokens)]
    return own


def combined(rows: Sequence[np.ndarray], combine: str) -> np.ndarray:
    """[n] of every row's [n]; -inf in any row is -inf."""
    together = np.array(rows)
    values = together.max(axis=0) if combine == "max" else _sum(rows) / len(rows)
    return np.where(np.isneginf(together).any(axis=0), -math.inf, values)


def _sum(rows: Iterable[np.ndarray]) -> np.ndarray:
    """In order, one after the other."""
    total: np.ndarray | float = 0.0
    for row in rows:
        total = total + row
    return np.asarray(total)


def votes(rows: Sequence[RowState], picks: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """[n] how many rows picked each token, -inf where it is nobody's candidate; and the sums of its base scores over the
    rows whose candidate it is."""
    counts, sums = np.full(rows[0].num_tokens, -math.inf), np.zeros(rows[0].num_tokens)
    for row, picked in zip(rows, picks, strict=True):
        for j in row.candidates:
            counts[j] = max(counts[j], 0.0) + (j in picked)
            sums[j] += row.shifted[j]
    return counts, sums


def taken(
    row: RowState, values: np.ndarray, ties: np.ndarray, paging: Paging | None, combine: str, *, by_votes: bool
) -> tuple[list[int], list[int]]:
    """The units answered and the tokens kept, both ascending, from what every token is worth [n] (-inf: nothing)."""
    n = row.num_tokens
    if n <= row.budget:
        return list(range(n if paging is None else paging.count)), list(range(n))
    able = [j for j in range(n) if values[j] > -math.inf]
    if paging is None:
        best = sorted(able, key=lambda j: (-values[j], -ties[j], j))
        kept = sorted([*row.always, *best[: row.contended]])
        return kept, kept
    worth = {}
    for page in range(-(-n // paging.size)):
        inside = [j for j in page_tokens(page, paging.size, n) if j in able]
        if page in paging.always or not inside:
            continue
        own = [float(values[j]) for j in inside]
        value = sum(own) if by_votes else max(own) if combine == "max" else sum(own) / len(own)
        worth[page] = (-value, -sum(float(ties[j]) for j in inside), page)
    best = sorted(worth, key=lambda page: worth[page])
    pages = sorted([*paging.always, *best[: paging.count - len(paging.always)]])
    return pages, [j for page in pages for j in page_tokens(page, paging.size, n)]


def page_tokens(page: int, size: int, num_tokens: int) -> range:
    """The tokens of a page; the last may have fewer."""
    return range(page * size, min((page + 1) * size, num_tokens))


def _ratio(shared: Sequence[Shared]) -> float:
    """Numerators and denominators summed over all rows before dividing."""
    kept = every = 0.0
    for own in shared:
        for _, row in own.members:
            kept += sum(float(row.shifted[j]) for j in own.counted(row) if j in own.kept)
            every += sum(float(row.shifted[j]) for j in row.contenders)
    return kept / every if every > 0 else 1.0


def _changed(shared: Shared) -> int:
    """Kept contenders that the base method does not keep, counted in every row that they count for."""
    new = {j for j in shared.contenders if j in shared.kept and j not in shared.base_kept}
    return sum(j in new for _, row in shared.members for j in shared.counted(row))
