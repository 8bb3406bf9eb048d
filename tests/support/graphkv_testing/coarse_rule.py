"""The rule for answers that rows share, for pages, for heads that share a budget and for the budget "cake".

Every number becomes an interval (`graphkv_testing.row_worth`); an answer is right when nothing dropped certainly precedes
something kept. Where arithmetic leaves what a row chose open (a vote, an x), only sizes and what is certain all the same are
judged, and the verdict is not exact.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from graphkv_testing.adaptive import safe_count
from graphkv_testing.bounds import UNIT, attention_error, gamma, score_bounds
from graphkv_testing.budgets_reference import cake_shares
from graphkv_testing.coarse import page_tokens
from graphkv_testing.open_orders import Outcome, judge_order
from graphkv_testing.row_worth import Units, Worth, base_picks, base_worth, combine_worths, worth
from graphkv_testing.states import Cake, CoarseState, LayerState, Paging, RowState, Shared

__all__ = ["budgets_open", "coarse_figures", "heads_figures", "judge_heads", "judge_shared", "kept_of", "token_units"]


# --- answers that rows share, and pages ----------------------------------------------------------------------------------


def token_units(shared: Shared, worths: Sequence[Worth], combine: str) -> Units:
    """All n tokens of an answer's row, whether they contend or not (`sure` says so)."""
    n = shared.first.num_tokens
    if not shared.votes:
        low, high, keys = combine_worths([(own.low, own.high, own.keys) for own in worths], combine)
        able = np.all([_contends(row) for _, row in shared.members], axis=0)
        return Units(low.copy(), high.copy(), list(keys), able)
    votes, ties = np.zeros((2, n)), []
    for (state, row), own in zip(shared.members, worths, strict=True):
        if own.picked is None:
            votes[1] += own.maybe
        else:
            votes[:, own.picked] += 1
        base = base_worth(state, row, shifted=True)
        keys = [("v", 0.0) if not own.maybe[j] else base.keys[j] if own.sure[j] else None for j in range(n)]
        low, high = np.where(own.sure, base.low, 0.0), np.where(own.maybe, base.high, 0.0)
        ties.append((np.minimum(low, base.low * own.maybe), high, keys))
    low, high, keys = combine_worths(ties, "sum")
    then = Units(low, high, keys, np.ones(n, dtype=bool))
    exact = [("v", float(low)) if low == high else None for low, high in votes.T]
    return Units(votes[0], votes[1], list(exact), np.any([own.sure for own in worths], axis=0), then)


def _contends(row: RowState) -> np.ndarray:
    able = np.zeros(row.num_tokens, dtype=bool)
    able[row.contenders] = True
    return able


def judge_shared(state: CoarseState, shared: Shared, units: Sequence[int]) -> Outcome:
    """`units`: one row of the answer, token or page ids."""
    if state.keeps_all:
        return _same(list(units), shared.units)
    worths = [worth(own, row) for own, row in shared.members]
    tokens = token_units(shared, worths, state.policy.combine)
    maybe = tokens.sure.copy()
    if shared.votes:
        maybe = np.any([own.maybe for own in worths], axis=0)
    return _judge_units(shared.first, state.paging, tokens, maybe, list(units), state.policy.combine, by_votes=shared.votes)


def _judge_units(
    row: RowState, paging: Paging | None, tokens: Units, maybe: np.ndarray, units: list[int], combine: str, *, by_votes: bool
) -> Outcome:
    n = row.num_tokens
    if paging is None:
        always, room, able = row.always, row.contended, [int(j) for j in np.flatnonzero(maybe)]
        competing = tokens.at(able)
    else:
        always, room = paging.always, paging.count - len(paging.always)
        inside = {
            page: [j for j in page_tokens(page, paging.size, n) if maybe[j]]
            for page in range(-(-n // paging.size))
            if page not in always
        }
        able = [page for page, own in inside.items() if own]
        competing = tokens.combined([inside[page] for page in able], "sum" if by_votes else combine)
    problem = _shape_problem(units, always, able, room, int(competing.sure.sum()))
    if problem:
        return Outcome(False, False, problem)
    return judge_order(able, competing.before(), set(units) - set(always))


def _shape_problem(units: list[int], always: Sequence[int], able: Sequence[int], room: int, surely: int) -> str:
    least, most = (len(always) + min(room, count) for count in (surely, len(able)))
    if units != sorted(set(units)):
        return "not ascending, or one twice"
    if not least <= len(units) <= most:
        return f"{len(units)} kept where {least} to {most} are to be"
    if not set(always) <= set(units):
        return f"always-kept ones missing: {sorted(set(always) - set(units))}"
    if not set(units) <= set(always) | set(able):
        return f"kept, but it cannot be: {sorted(set(units) - set(always) - set(able))}"
    return ""


def _same(got: list[int], wanted: list[int]) -> Outcome:
    return Outcome(got == wanted, got == wanted, "" if got == wanted else f"{got} where all are kept")


def kept_of(state: CoarseState, units: Sequence[int]) -> list[int]:
    """The tokens that these units hold."""
    if state.paging is None:
        return list(units)
    return [j for page in units for j in page_tokens(page, state.paging.size, state.num_tokens)]


def coarse_figures(state: CoarseState, answer: Sequence[Sequence[int]], ratio: float | None, changed: int | None) -> list[str]:
    """kept_score_ratio and changed for the sets that were kept, where arithmetic does not leave them open."""
    if state.keeps_all:
        return _figures(state.layer, (1.0, 0.0), 0, ratio, changed)
    kept_mass, all_mass, error, terms, new = 0.0, 0.0, 0.0, 0, 0
    for shared, units in zip(state.shared, answer, strict=True):
        kept = set(kept_of(state, units))
        worths = [worth(own, row) for own, row in shared.members]
        if shared.votes and any((own.sure != own.maybe).any() for own in worths):
            return []  # who is a candidate is open
        for own, row in shared.members:
            bound = score_bounds(own, row).shifted
            kept_mass += sum(float(row.shifted[j]) for j in shared.counted(row) if j in kept)
            all_mass += sum(float(row.shifted[j]) for j in row.contenders)
            error += sum(float(bound[1][j] - bound[0][j]) for j in row.contenders) / 2
            terms += len(row.contenders)
        if changed is not None:
            if not _base_is_certain(state, shared):
                changed = None
            gone = set(shared.contenders) & kept - set(shared.base_kept)
            new += sum(j in gone for _, row in shared.members for j in shared.counted(row))
    wanted = (kept_mass / all_mass, 2 * error / all_mass + gamma(terms) + 2 * UNIT) if all_mass > 0 else (1.0, 0.0)
    return _figures(state.layer, wanted, new, ratio, changed)


def _base_is_certain(state: CoarseState, shared: Shared) -> bool:
    worths = []
    for own, row in shared.members:
        base = base_worth(own, row)
        if shared.votes:
            base.picked = base_picks(own, row)
            for mask in (base.sure, base.maybe):
                mask[:] = False
                mask[list(row.candidates)] = True
        worths.append(base)
    tokens = token_units(shared, worths, state.policy.combine)
    units = shared.base_kept
    if state.paging is not None:
        units = sorted({j // state.paging.size for j in shared.base_kept})
    row, combine = shared.first, state.policy.combine
    return _judge_units(row, state.paging, tokens, tokens.sure, units, combine, by_votes=shared.votes).exact


def _figures(layer: int, wanted: tuple[float, float], new: int, ratio: float | None, changed: int | None) -> list[str]:
    problems = []
    if ratio is not None and not abs(ratio - wanted[0]) <= wanted[1]:
        problems.append(f"layer {layer}: kept_score_ratio {ratio!r} is not {wanted[0]!r} within {wanted[1]:.1e}")
    if changed is not None and changed != new:
        problems.append(f"layer {layer}: changed {changed} is not {new}")
    return problems


# --- adaptive_heads --------------------------------------------------------------------------------------------------------


def judge_heads(state: LayerState, kept: Sequence[Sequence[int]], *, base: bool = False) -> Outcome:
    """`kept`: one row a head, always-kept tokens included. base: by base scores, as without a graph."""
    if state.keeps_all:
        return _same([list(own) for own in kept], [row.kept for row in state.rows])
    worths = [base_worth(state, row) if base else worth(state, row, in_logs=True) for row in state.rows]
    safe = safe_count(state.policy, state.budget, len(state.rows[0].always))
    places = [(head, int(j)) for head, own in enumerate(worths) for j in np.flatnonzero(own.maybe)]
    head_of, token_of = (np.array([pair[side] for pair in places], dtype=int) for side in (0, 1))
    columns = [np.array([getattr(worths[head], name)[j] for head, j in places]) for name in ("low", "high", "sure")]
    units = Units(columns[0], columns[1], [worths[head].keys[j] for head, j in places], columns[2].astype(bool))
    chosen = np.zeros(len(places), dtype=bool)
    total = 0
    for head, (row, own) in enumerate(zip(state.rows, kept, strict=True)):
        least = min(safe, int(worths[head].sure.sum()))
        able = [j for h, j in places if h == head]
        problem = _shape_problem(list(own), row.always, able, len(able), least)
        if problem:
            return Outcome(False, False, f"KV head {head}: {problem}")
        chosen |= (head_of == head) & np.isin(token_of, [j for j in own if j not in row.always])
        total += len(own) - len(row.always)
    room = len(state.rows) * state.rows[0].contended
    if not min(room, int(units.sure.sum())) <= total <= min(room, len(places)):
        return Outcome(
            False, False, f"{total} tokens besides the always-kept ones, of {room} places for {len(places)} candidates"
        )
    before, alike = units.before(), head_of[:, None] == head_of[None, :]
    own_kept = alike & chosen[:, None]  # [i, j]: i is kept in j's head
    surely_unsafe = (own_kept & before).sum(axis=0) >= safe
    np.fill_diagonal(own_kept, val=False)
    surely_safe = (own_kept & ~before.T).sum(axis=0) < safe
    wrong = before & ~chosen[:, None] & chosen[None, :] & (alike | surely_unsafe[None, :])
    if wrong.any():
        lost, taken = (places[int(place)] for place in np.argwhere(wrong)[0])
        return Outcome(False, False, f"(head, token) {lost} was dropped although it certainly precedes {taken}, which was kept")
    open_pairs = ~before.T & ~chosen[:, None] & chosen[None, :] & (alike | ~surely_safe[None, :])
    return Outcome(True, not open_pairs.any())


def heads_figures(state: LayerState, kept: Sequence[Sequence[int]], ratio: float | None, changed: int | None) -> list[str]:
    """As `coarse_figures`."""
    if state.keeps_all:
        return _figures(state.layer, (1.0, 0.0), 0, ratio, changed)
    kept_mass, all_mass, error, terms, new = 0.0, 0.0, 0.0, 0, 0
    for row, own in zip(state.rows, kept, strict=True):
        bound = score_bounds(state, row).shifted
        inside = set(own) - set(row.always)
        kept_mass += sum(float(row.shifted[j]) for j in inside)
        all_mass += sum(float(row.shifted[j]) for j in row.contenders)
        error += sum(float(bound[1][j] - bound[0][j]) for j in row.contenders) / 2
        terms += len(row.contenders)
        new += len(inside - set(row.base_kept))
    if (
        changed is not None
        and not judge_heads(state, [sorted([*row.always, *row.base_kept]) for row in state.rows], base=True).exact
    ):
        changed = None
    wanted = (kept_mass / all_mass, 2 * error / all_mass + gamma(terms) + 2 * UNIT) if all_mass > 0 else (1.0, 0.0)
    return _figures(state.layer, wanted, new, ratio, changed)


# --- cake ------------------------------------------------------------------------------------------------------------------


def budgets_open(cake: Cake | None, head_dim: int, num_tokens: int) -> bool:
    """Whether arithmetic may have shared the budget otherwise: a share near a whole number, or two fractions alike."""
    if cake is None or not any(cake.weights):
        return False
    ends = [_weight_ends(cake, layer, head_dim, num_tokens) for layer in range(len(cake.weights))]
    few = len(ends) <= 6
    sides = (
        itertools.product((0, 1), repeat=len(ends))
        if few
        else [[side if layer == one else 1 - side for layer in range(len(ends))] for one in range(len(ends)) for side in (0, 1)]
    )
    return any(
        cake_shares([end[side] for end, side in zip(ends, own, strict=True)], cake.contended, cake.most) != cake.shares
        for own in sides
    )


def _weight_ends(cake: Cake, layer: int, head_dim: int, num_tokens: int) -> tuple[float, float]:
    a = cake.received[layer]
    logits, relative = cake.logits[layer], 2 * UNIT
    if logits is not None:
        relative += attention_error(logits, head_dim, num_tokens)
    entropy = relative * float((a * (np.abs(np.log(a + 1e-10)) + 1.0)).sum()) + UNIT * cake.entropy[layer]
    mean = a.mean(axis=1, keepdims=True)
    spread = float((2 * np.abs(a - mean) * (a + mean)).sum()) / max(1, a.shape[1] - 1)
    variance = relative * spread + gamma(a.shape[1]) * cake.variance[layer]
    ends = []
    for sign in (-1, 1):
        h, v = cake.entropy[layer] + sign * entropy, cake.variance[layer] + sign * variance
        ends.append(h ** cake.exponents[0] * v ** cake.exponents[1] if h > 0 and v > 0 else 0.0)
    return ends[0], ends[1]
