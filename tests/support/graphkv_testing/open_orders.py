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

__all__ = ["Outcome", "Updated", "judge_order", "replay", "replay_order", "updated", "walk"]

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


@dataclass
class Updated:
    """What one-shot propagation may have made of a row, [n]: bounds of the scores, and for evict who may be evicted.

    touched: it may have changed the score. worst, best: it stays in the worst and in the best case.
    """

    low: np.ndarray
    high: np.ndarray
    touched: np.ndarray
    worst: np.ndarray
    best: np.ndarray

    def before(self, ids: np.ndarray, tied: np.ndarray) -> np.ndarray:
        """[i, j] true where ids[i] certainly ranks before ids[j]; `tied`: equal in any arithmetic before the update."""
        low, high, touched = self.low[ids], self.high[ids], self.touched[ids]
        exact = low == high
        same = exact[:, None] & exact[None, :] & (low[:, None] == low[None, :])
        same |= tied & ~touched[:, None] & ~touched[None, :]
        wins = (low[:, None] > high[None, :]) | (same & (ids[:, None] < ids[None, :]))
        worst, best = self.worst[ids], self.best[ids]
        return (worst[:, None] > best[None, :]) | ((worst[:, None] == best[None, :]) & wins)


def updated(
    row: RowState,
    start: tuple[np.ndarray, np.ndarray],
    edges: Edges,
    candidates: list[int],
    sources: list[int],
    graph: Graph,
) -> Updated:
    """Of scores within `start` [n], with these candidates and sources."""
    targets = [j for j in candidates if j not in sources]
    per_source: float = math.inf if graph.neighbors is None else graph.neighbors
    if graph.neighbors == "auto":
        per_source = math.ceil(row.budget / max(1, len(sources)))
    near, maybe_near = _neighbours(edges, sources, targets, per_source)
    low, high = start[0].copy(), start[1].copy()
    worst, best, touched = (np.full(row.num_tokens, value) for value in (True, True, False))
    if graph.signal == "evict":
        worst, best = ~maybe_near.any(axis=0), ~near.any(axis=0)
        return Updated(low, high, touched, worst, best)
    bounds = edges.factors(graph.strength, 1.0 if graph.signal == "enhance" else -1.0)
    for j in targets:
        touched[j] = _update(low, high, j, near[:, j], maybe_near[:, j], sources, bounds, graph)
    return Updated(low, high, touched, worst, best)


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


@dataclass
class Step:
    """Before a choice, by place among the candidates: bounds of x and of the sum of log factors, whether a factor may have
    touched it, and whether it remains."""

    low: np.ndarray
    high: np.ndarray
    sums: tuple[np.ndarray, np.ndarray]
    touched: np.ndarray
    remaining: np.ndarray


class Race:
    """Candidates of one row, chosen one by one; every number as an interval."""

    def __init__(self, scores: Scores, edges: Edges, candidates: list[int], strength: float) -> None:
        self.ids = np.array(candidates, dtype=int)
        self._edges = edges
        self._factors = edges.log_factors(strength)
        self._tied = scores.tied(self.ids)
        low, high = (logs(bound[self.ids]) for bound in scores.shifted)
        low, high = low - 2 * UNIT * _size(low), high + 2 * UNIT * _size(high)
        nothing = np.zeros(len(self.ids))
        self.start = Step(low, high, (nothing, nothing), nothing.astype(bool), ~nothing.astype(bool))

    def first(self, step: Step) -> np.ndarray:
        """The places that nothing remaining certainly precedes."""
        places = np.flatnonzero(step.remaining)
        lost = np.isneginf(step.high)
        same = (self._tied & ~step.touched[:, None] & ~step.touched[None, :]) | (lost[:, None] & lost[None, :])
        before = (step.low[:, None] > step.high[None, :]) | (same & (self.ids[:, None] < self.ids[None, :]))
        return places[~before[np.ix_(places, places)].any(axis=0)]

    def choose(self, step: Step, place: int) -> Step:
        """The step after choosing the candidate at `place`."""
        own, ids = self.ids[place], self.ids
        remaining = step.remaining.copy()
        remaining[place] = False
        hit = self._edges.high[own, ids] > 0
        bounds = []
        for values, factors, sign in zip((step.low, step.high, *step.sums), self._factors * 2, (-1, 1, -1, 1), strict=True):
            after = values.copy()
            after[hit] += factors[own, ids[hit]]
            after[hit] += sign * UNIT * _size(after[hit])
            bounds.append(after)
        return Step(bounds[0], bounds[1], (bounds[2], bounds[3]), step.touched | hit, remaining)


def replay(scores: Scores, edges: Edges, candidates: list[int], chosen: set[int], strength: float) -> Outcome:
    """Whether `chosen` can be kept one by one, each when no remaining candidate certainly precedes it in x.

    x depends on the set kept so far, not on its order; so the search goes over sets, the likeliest order first.
    """
    outside = chosen - set(candidates)
    if outside:
        return Outcome(False, False, f"kept, but no candidates: {sorted(outside)}")
    race = Race(scores, edges, candidates, strength)
    wanted = np.array([j in chosen for j in candidates], dtype=bool)
    stack, seen, exact, deepest, problem = [race.start], set(), True, -1, ""
    while stack:
        step = stack.pop()
        kept = len(candidates) - int(step.remaining.sum())
        if kept == len(chosen):
            return Outcome(True, exact)
        first = race.first(step)
        exact = exact and len(first) == 1
        options = [int(place) for place in first if wanted[place]]
        if not options and kept > deepest:
            deepest, problem = kept, _stuck(race, step, wanted, kept)
        for place in sorted(options, key=lambda place: (step.high[place], -place)):
            after = race.choose(step, place)
            key = after.remaining.tobytes()
            if key not in seen and len(seen) <= MOST_STATES:
                seen.add(key)
                stack.append(after)
    return Outcome(False, False, problem)


def _stuck(race: Race, step: Step, wanted: np.ndarray, kept: int) -> str:
    places = np.flatnonzero(step.remaining)
    best = max(places, key=lambda place: (step.high[place], -place))
    left = max((place for place in places if wanted[place]), key=lambda place: (step.high[place], -place))
    return (
        f"after {kept} choices token {race.ids[best]} is the best remaining, x in [{step.low[best]:.9g}, {step.high[best]:.9g}];"
        f" the best one kept later is {race.ids[left]}, x in [{step.low[left]:.9g}, {step.high[left]:.9g}]"
    )


def replay_order(scores: Scores, edges: Edges, candidates: list[int], order: Sequence[int], strength: float) -> str:
    """What is wrong with this order of choice, or nothing."""
    race = Race(scores, edges, candidates, strength)
    step = race.start
    for count, token in enumerate(order):
        place = candidates.index(token) if token in candidates else -1
        if place not in race.first(step):
            return f"choice {count} is token {token}, which is no candidate or certainly not the best remaining"
        step = race.choose(step, place)
    return ""


def walk(scores: Scores, edges: Edges, candidates: list[int], count: int, strength: float) -> tuple[list[int], Step] | None:
    """The one order in which `count` candidates can be chosen, and each one's numbers at the moment of its choice, or at the
    end; None where arithmetic leaves a choice open."""
    race = Race(scores, edges, candidates, strength)
    step, order = race.start, []
    for _ in range(min(count, len(candidates))):
        first = race.first(step)
        if len(first) != 1:
            return None
        order.append(int(race.ids[first[0]]))
        after = race.choose(step, int(first[0]))
        for values, frozen in zip((after.low, after.high, *after.sums), (step.low, step.high, *step.sums), strict=True):
            values[~step.remaining] = frozen[~step.remaining]
            values[first[0]] = frozen[first[0]]
        after.touched[~step.remaining] = step.touched[~step.remaining]
        after.touched[first[0]] = step.touched[first[0]]
        step = after
    return order, step


def _size(values: np.ndarray) -> np.ndarray:
    """|x|, and 0 for -inf, which is exact."""
    return np.where(np.isfinite(values), np.abs(values), 0.0)
