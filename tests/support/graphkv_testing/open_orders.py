"""What the bounds leave open in one row: which token certainly ranks before which, and which kept sets can follow.

One-shot propagation gives a partial order of the candidates; sequential propagation is replayed step by step. Knows one
row with its candidates and sources decided; `graphkv_testing.rule` tries the ways to decide them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphkv.terms.policy import Graph
from graphkv_testing.bounds import LARGEST, TINY, UNIT, Edges, Scores, gamma, logs
from graphkv_testing.states import RowState

__all__ = ["Outcome", "judge_order", "replay", "updated_before"]

MOST_STATES = 20_000  # sets visited by one replay


@dataclass
class Outcome:
    """ok: the set can be right; exact: nothing else can; problem: why not."""

    ok: bool
    exact: bool
    problem: str = ""


def judge_order(tokens: Sequence[int], before: np.ndarray, chosen: set[int]) -> Outcome:
    """Whether `chosen` can be the first of `tokens`: no dropped one certainly precedes a kept one."""
    outside = chosen - set(tokens)
    if outside:
        return Outcome(False, False, f"kept, but no candidates: {sorted(outside)}")
    kept = np.array([j in chosen for j in tokens], dtype=bool)
    wrong = before & ~kept[:, None] & kept[None, :]
    if wrong.any():
        dropped, taken = (tokens[int(i)] for i in np.argwhere(wrong)[0])
        return Outcome(False, False, f"token {dropped} was dropped although it certainly precedes {taken}, which was kept")
    open_pairs = ~before & kept[:, None] & ~kept[None, :]
    return Outcome(True, not open_pairs.any())


# --- one-shot propagation ------------------------------------------------------------------------------------------------


def updated_before(
    row: RowState, scores: Scores, edges: Edges, candidates: list[int], sources: list[int], graph: Graph
) -> np.ndarray:
    """[i, j] true where candidates[i] certainly ranks before candidates[j] by updated score."""
    ids = np.array(candidates, dtype=int)
    targets = [j for j in candidates if j not in sources]
    per_source: float = math.inf if graph.neighbors is None else graph.neighbors
    if graph.neighbors == "auto":
        per_source = math.ceil(row.budget / max(1, len(sources)))
    near, maybe_near = _neighbours(edges, sources, targets, per_source)
    low, high = scores.shifted[0].copy(), scores.shifted[1].copy()
    tied = scores.tied(ids)
    if graph.signal == "evict":
        worst, best = ~maybe_near.any(axis=0), ~near.any(axis=0)  # may it be evicted; may it stay
    else:
        worst = best = np.ones(row.num_tokens, dtype=bool)
        touched = np.zeros(row.num_tokens, dtype=bool)
        bounds = edges.factors(graph.strength, 1.0 if graph.signal == "enhance" else -1.0)
        for j in targets:
            touched[j] = _update(low, high, j, near[:, j], maybe_near[:, j], sources, bounds, graph)
        same = low[ids] == high[ids]
        same = same[:, None] & same[None, :] & (low[ids][:, None] == low[ids][None, :])
        tied = same | (tied & ~touched[ids][:, None] & ~touched[ids][None, :])
    worst, best, low, high = worst[ids], best[ids], low[ids], high[ids]
    wins = (low[:, None] > high[None, :]) | (tied & (ids[:, None] < ids[None, :]))
    return (worst[:, None] > best[None, :]) | ((worst[:, None] == best[None, :]) & wins)


def _neighbours(edges: Edges, sources: list[int], targets: list[int], most: float) -> tuple[np.ndarray, np.ndarray]:
    """[source's place, token]: certainly a neighbour, and perhaps one."""
    near = np.zeros((len(sources), len(edges.low)), dtype=bool)
    maybe_near = near.copy()
    ids = np.array(targets, dtype=int)
    for place, source in enumerate(sources):
        surely, maybe = edges.surely[source, ids], edges.maybe[source, ids]
        low, high = edges.low[source, ids], edges.high[source, ids]
        ones = low == 1.0
        before = (low[:, None] > high[None, :]) | (ones[:, None] & ones[None, :] & (ids[:, None] < ids[None, :]))
        rivals = maybe[:, None] & ~before.T  # [i, j]: i may come before j
        np.fill_diagonal(rivals, val=False)
        ahead = surely[:, None] & before
        near[place, ids] = surely & (rivals.sum(axis=0) < most)
        maybe_near[place, ids] = maybe & (ahead.sum(axis=0) < most)
    return near, maybe_near


def _update(
    low: np.ndarray,
    high: np.ndarray,
    j: int,
    near: np.ndarray,
    maybe_near: np.ndarray,
    sources: list[int],
    bounds: tuple[np.ndarray, np.ndarray],
    graph: Graph,
) -> bool:
    """Widens low[j], high[j] to what the update may give; whether it can change the score at all."""
    touching = [(sources[int(place)], bool(near[place])) for place in np.flatnonzero(maybe_near)]
    if not touching or high[j] == 0.0:
        return False
    factors = []
    for source, sure in touching:
        bottom, top = (float(bound[source, j]) for bound in bounds)
        factors.append((bottom, top) if sure else (min(bottom, 1.0), max(top, 1.0)))
    if (0.0, 0.0) in factors and (graph.update == "product" or len(factors) == 1):
        low[j] = high[j] = 0.0
    elif graph.update == "product":
        times = len(factors) * graph.rounds
        for bottom, top in factors:
            low[j] = min(low[j] * bottom**graph.rounds, 2 * LARGEST)
            high[j] = min(high[j] * top**graph.rounds, 2 * LARGEST)
        wide = gamma(times) + 2 * UNIT
        low[j], high[j] = low[j] * (1 - wide), high[j] * (1 + wide)
        if high[j] < TINY:
            high[j] = TINY
        if low[j] < TINY:
            low[j] = 0.0
    else:
        least = 1.0 + sum(bottom - 1.0 for bottom, _ in factors)
        most = 1.0 + sum(top - 1.0 for _, top in factors)
        wide = (gamma(len(factors)) + 2 * UNIT) * high[j] * (1.0 + len(factors))
        ends = [value * total for value in (low[j], high[j]) for total in (least, most)]
        low[j], high[j] = min(ends) - wide, max(ends) + wide
    low[j], high[j] = min(low[j], LARGEST), min(high[j], LARGEST)
    return True


# --- sequential propagation ----------------------------------------------------------------------------------------------


def replay(scores: Scores, edges: Edges, candidates: list[int], chosen: set[int], strength: float) -> Outcome:
    """Whether `chosen` can be kept one by one, each when no remaining candidate certainly precedes it in x.

    x depends on the set kept so far, not on its order; so the search goes over sets, the likeliest order first.
    """
    outside = chosen - set(candidates)
    if outside:
        return Outcome(False, False, f"kept, but no candidates: {sorted(outside)}")
    ids = np.array(candidates, dtype=int)
    factor_low, factor_high = edges.log_factors(strength)
    low, high = logs(scores.shifted[0][ids]), logs(scores.shifted[1][ids])
    low, high = low - 2 * UNIT * _size(low), high + 2 * UNIT * _size(high)
    tied, wanted = scores.tied(ids), np.array([j in chosen for j in candidates], dtype=bool)
    start = (low, high, np.zeros(len(ids), dtype=bool), np.ones(len(ids), dtype=bool))
    stack, seen, exact, deepest, problem = [start], set(), True, -1, ""
    while stack:
        low, high, touched, remaining = stack.pop()
        kept = len(ids) - int(remaining.sum())
        if kept == len(chosen):
            return Outcome(True, exact)
        places = np.flatnonzero(remaining)
        same = (tied & ~touched[:, None] & ~touched[None, :]) | (np.isneginf(high)[:, None] & np.isneginf(high)[None, :])
        before = (low[:, None] > high[None, :]) | (same & (ids[:, None] < ids[None, :]))
        first = places[~before[np.ix_(places, places)].any(axis=0)]  # those that nothing certainly precedes
        exact = exact and len(first) == 1
        options = [int(place) for place in first if wanted[place]]
        if not options and kept > deepest:
            deepest = kept
            best = max(places, key=lambda place: (high[place], -place))
            left = max((place for place in places if wanted[place]), key=lambda place: (high[place], -place))
            problem = (
                f"after {kept} choices token {ids[best]} is the best remaining, x in [{low[best]:.9g}, {high[best]:.9g}]; the best"
                f" one kept later is {ids[left]}, x in [{low[left]:.9g}, {high[left]:.9g}]"
            )
        for place in sorted(options, key=lambda place: (high[place], -place)):
            rest = remaining.copy()
            rest[place] = False
            key = rest.tobytes()
            if key in seen or len(seen) > MOST_STATES:
                continue
            seen.add(key)
            new_low, new_high, hit = low.copy(), high.copy(), edges.high[ids[place], ids] > 0
            new_low[hit] += factor_low[ids[place], ids[hit]]
            new_high[hit] += factor_high[ids[place], ids[hit]]
            new_low[hit] -= UNIT * _size(new_low[hit])
            new_high[hit] += UNIT * _size(new_high[hit])
            stack.append((new_low, new_high, touched | hit, rest))
    return Outcome(False, False, problem)


def _size(values: np.ndarray) -> np.ndarray:
    """|x|, and 0 for -inf, which is exact."""
    return np.where(np.isfinite(values), np.abs(values), 0.0)
