"""What a token of one row may be worth where rows meet, as intervals; and how intervals of several rows, or of a page's
tokens, combine. Knows the arithmetic (`graphkv_testing.bounds`), not the rule that judges by it.
"""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from graphkv_testing.bounds import UNIT, Scores, edge_bounds, gamma, score_bounds
from graphkv_testing.open_orders import Updated, updated, walk
from graphkv_testing.states import LayerState, RowState
from graphkv_testing.worlds import cut, worlds

__all__ = ["Units", "Worth", "base_picks", "base_worth", "worth"]

MOST_WORLDS = 64
GRID = 1024.0  # sums of multiples of 1 / GRID below GRID are exact in float32, in any order
Key = Hashable | None


@dataclass
class Worth:
    """One row, [n] each. keys: tokens with the same are worth the same in any arithmetic; None is like no other.

    sure, maybe: it is a candidate for certain, or perhaps. picked: sequential only, the tokens chosen; None where arithmetic
    leaves that open, and with it what they are worth.
    """

    low: np.ndarray
    high: np.ndarray
    keys: list[Key]
    sure: np.ndarray
    maybe: np.ndarray
    factors: tuple[np.ndarray, np.ndarray]
    decided: bool = True
    picked: list[int] | None = None


@dataclass
class Units:
    """What competes, tokens or pages (or tokens of several heads), in the order that decides ties.

    sure: it can be chosen for certain. then: what decides where `low` to `high` are equal.
    """

    low: np.ndarray
    high: np.ndarray
    keys: list[Key]
    sure: np.ndarray
    then: "Units | None" = field(default=None)

    def before(self) -> np.ndarray:
        """[i, j] true where i certainly ranks before j."""
        places = np.arange(len(self.low))
        earlier = places[:, None] < places[None, :]
        same = self._same()
        if self.then is None:
            first = (self.low[:, None] > self.high[None, :]) | (same & earlier)
        else:
            equal = self.then._same()
            wins = (self.then.low[:, None] > self.then.high[None, :]) | (equal & earlier)
            first = (self.low[:, None] > self.high[None, :]) | ((self.low[:, None] >= self.high[None, :]) & wins)
        return first & self.sure[:, None]

    def _same(self) -> np.ndarray:
        numbers: dict[Key, int] = {}
        ids = np.array(
            [-1 - place if key is None else numbers.setdefault(key, len(numbers)) for place, key in enumerate(self.keys)],
            dtype=int,
        )
        return ids[:, None] == ids[None, :]

    def at(self, places: Sequence[int]) -> "Units":
        """Only these."""
        chosen = list(places)
        keys = [self.keys[place] for place in chosen]
        then = None if self.then is None else self.then.at(chosen)
        return Units(self.low[chosen], self.high[chosen], keys, self.sure[chosen], then)

    def combined(self, groups: Sequence[Sequence[int]], combine: str) -> "Units":
        """One for each group of places: the mean, the largest or the sum of what is in it."""
        parts = [[self.at([place]) for place in group] for group in groups]
        found = [combine_worths([(unit.low, unit.high, unit.keys) for unit in group], combine) for group in parts]
        low, high = (np.array([float(own[side][0]) for own in found]) for side in (0, 1))
        sure = np.array([bool(self.sure[list(group)].any()) for group in groups], dtype=bool)
        then = None if self.then is None else self.then.combined(groups, "sum")
        return Units(low, high, [own[2][0] for own in found], sure, then)


def combine_worths(
    rows: Sequence[tuple[np.ndarray, np.ndarray, list[Key]]], combine: str
) -> tuple[np.ndarray, np.ndarray, list[Key]]:
    """Row by row (low, high, keys), to one: the mean, the largest or the sum, in order."""
    if len(rows) == 1:
        return rows[0]
    low, high = np.array([own[0] for own in rows]), np.array([own[1] for own in rows])
    if combine == "max":
        ends = low.max(axis=0), high.max(axis=0)
    else:
        share = 1 if combine == "sum" else len(rows)
        with np.errstate(invalid="ignore"):
            wide = (gamma(len(rows)) + 2 * UNIT) * np.maximum(np.abs(low), np.abs(high)).sum(axis=0) / share
            ends = low.sum(axis=0) / share - wide, high.sum(axis=0) / share + wide
    keys: list[Key] = []
    for place in range(low.shape[1]):
        own = [row[2][place] for row in rows]
        exact = [_exact(key) for key in own]
        if all(value is not None for value in exact):
            values = [value for value in exact if value is not None]
            total = max(values) if combine == "max" else sum(values, Fraction(0)) / (1 if combine == "sum" else len(own))
            keys.append(("v", float(total)) if _on_grid(total, values) else ("q", total))
            if combine == "max" or _on_grid(total, values):
                ends[0][place] = ends[1][place] = float(total)
        else:
            keys.append(None if None in own else tuple(own))
    return ends[0], ends[1], keys


def _exact(key: Key) -> Fraction | None:
    """The value of a key that is a number, if sums of such numbers are exact."""
    if isinstance(key, tuple) and key[0] == "v" and np.isfinite(key[1]):
        value = Fraction(key[1])
        return value if _on_grid(value, [value]) else None
    return None


def _on_grid(total: Fraction, values: Sequence[Fraction]) -> bool:
    return (total * int(GRID)).denominator == 1 and sum(abs(value) for value in values) < GRID


# --- one row -------------------------------------------------------------------------------------------------------------


def base_worth(state: LayerState, row: RowState, *, shifted: bool = False) -> Worth:
    """Base scores of all contenders."""
    scores = score_bounds(state, row)
    low, high = scores.shifted if shifted else scores.raw
    able = _mask(row, row.contenders)
    ones = np.ones(row.num_tokens)
    return Worth(low.copy(), high.copy(), _base_keys(state, row, scores, shifted=shifted), able, able.copy(), (ones, ones))


def worth(state: LayerState, row: RowState, *, in_logs: bool = False) -> Worth:
    """Updated scores of candidates, base scores of the others. in_logs: sequential scores as x."""
    graph = state.policy.graph
    if row.graph is None or graph is None:
        return base_worth(state, row)
    scores, edges = score_bounds(state, row), edge_bounds(state, row, threshold=graph.threshold)
    tried = list(itertools.islice(worlds(graph, row, scores), MOST_WORLDS + 1))
    base = base_worth(state, row, shifted=True)
    if graph.update == "sequential":
        return _sequential(row, base, tried, scores, walk(scores, edges, tried[0][0], row.contended, graph.strength), in_logs)
    if len(tried) > MOST_WORLDS:
        return _open(row, base)
    ones = np.ones(row.num_tokens)
    found = []
    for candidates, sources in tried:
        values = updated(row, scores.shifted, edges, candidates, sources, graph)
        factors = updated(row, (ones, ones), edges, candidates, sources, graph)
        found.append(_one_shot(row, base, scores, candidates, values, factors))
    return _union(found)


def _one_shot(row: RowState, base: Worth, scores: Scores, candidates: list[int], values: Updated, factors: Updated) -> Worth:
    low, high, keys, able = values.low.copy(), values.high.copy(), list(base.keys), _mask(row, candidates)
    ends = factors.low.copy(), factors.high.copy()
    ids = np.array(candidates, dtype=int)
    lower, upper = scores.shifted[0][ids], scores.shifted[1][ids]
    ahead = lower[:, None] > upper[None, :]  # [i, j]: i certainly ranks before j, evicted or not
    ahead |= scores.tied(ids) & (ids[:, None] < ids[None, :])
    for place, j in enumerate(candidates):
        if values.touched[j]:
            keys[j] = ("v", float(low[j])) if low[j] == high[j] else None
        if values.worst[j]:
            continue  # it stays
        others = np.arange(len(ids)) != place
        fewest = int((~values.best[ids] & ahead[:, place]).sum())
        most = int((~values.worst[ids] & ~ahead[place] & others).sum())
        low[j], ends[0][j] = -1.0 - most, 0.0
        if not values.best[j]:
            high[j], ends[1][j] = -1.0 - fewest, 0.0
        keys[j] = ("v", float(low[j])) if low[j] == high[j] else None
    return Worth(low, high, keys, able, able.copy(), ends)


def _union(found: list[Worth]) -> Worth:
    """What any of these worlds allows."""
    first = found[0]
    keys = [key if all(own.keys[j] == key for own in found) else None for j, key in enumerate(first.keys)]
    return Worth(
        np.min([own.low for own in found], axis=0),
        np.max([own.high for own in found], axis=0),
        keys,
        np.all([own.sure for own in found], axis=0),
        np.any([own.maybe for own in found], axis=0),
        (np.min([own.factors[0] for own in found], axis=0), np.max([own.factors[1] for own in found], axis=0)),
        decided=len(found) == 1,
    )


def _sequential(
    row: RowState, base: Worth, tried: list[tuple[list[int], list[int]]], scores: Scores, run: object, in_logs: bool
) -> Worth:
    if len(tried) > 1 or not isinstance(run, tuple):
        return _open(row, base, tried)
    order, step = run
    ids = np.array(tried[0][0], dtype=int)
    low, high, keys, able = base.low.copy(), base.high.copy(), list(base.keys), _mask(row, ids)
    ends = np.ones(row.num_tokens), np.ones(row.num_tokens)
    wide = 8 * UNIT
    if in_logs:
        low[ids], high[ids] = step.low, step.high
    else:
        low[ids], high[ids] = np.exp(step.low) * (1 - wide), np.exp(step.high) * (1 + wide)
    ends[0][ids], ends[1][ids] = np.exp(step.sums[0]) * (1 - wide), np.exp(step.sums[1]) * (1 + wide)
    for place, j in enumerate(ids):
        if np.isneginf(step.high[place]):
            keys[j] = ("v", -np.inf if in_logs else 0.0)
        elif step.touched[place]:
            keys[j] = None
        elif not in_logs:
            low[j], high[j] = scores.shifted[0][j], scores.shifted[1][j]
    return Worth(low, high, keys, able, able.copy(), ends, picked=order)


def _open(row: RowState, base: Worth, tried: Sequence[tuple[list[int], list[int]]] = ()) -> Worth:
    """Nothing is known but who may take part."""
    maybe = [_mask(row, candidates) for candidates, _ in tried[:MOST_WORLDS]] or [base.maybe]
    everywhere = np.full(row.num_tokens, np.inf)
    sure = np.all(maybe, axis=0) if tried and len(tried) <= MOST_WORLDS else np.zeros(row.num_tokens, dtype=bool)
    some = np.any(maybe, axis=0) if len(tried) <= MOST_WORLDS else base.maybe
    nothing: list[Key] = [None] * row.num_tokens
    return Worth(-everywhere, everywhere, nothing, sure, some, (-everywhere, everywhere), decided=False)


def _base_keys(state: LayerState, row: RowState, scores: Scores, *, shifted: bool) -> list[Key]:
    origin = state.importance
    moved = shifted and bool((row.base[row.contenders] < 0).any())
    own = (row.layer, row.head)
    keys: list[Key] = []
    for j in range(row.num_tokens):
        exact = scores.raw[0][j] == scores.raw[1][j]
        if exact and not moved:
            keys.append(("v", float(scores.raw[0][j])))
        elif exact or origin.equal == "row":
            keys.append((own, float(row.base[j])))
        elif origin.equal == "token":
            keys.append((row.layer, "token", j))
        else:
            keys.append(None)
    return keys


def _mask(row: RowState, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    mask = np.zeros(row.num_tokens, dtype=bool)
    mask[list(tokens)] = True
    return mask


def base_picks(state: LayerState, row: RowState) -> list[int] | None:
    """The B_sel best candidates by base score; None where arithmetic leaves them open."""
    inside, open_ones = cut(row.contenders, score_bounds(state, row).before(row.contenders), row.contended)
    return None if open_ones else inside
