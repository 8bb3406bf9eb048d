"""What an answer holds on request, held to the reference: exactly where it follows from the tokens kept, within the bounds of
the arithmetic where it is computed, and not at all where arithmetic leaves it open.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from graphkv_testing import outputs_reference as reference
from graphkv_testing.bounds import LARGEST, TINY, UNIT, edge_bounds, score_bounds
from graphkv_testing.coarse_rule import kept_of, token_units
from graphkv_testing.open_orders import replay_order
from graphkv_testing.row_worth import Worth, worth
from graphkv_testing.states import CoarseState, LayerState, RowState

__all__ = ["output_problems"]

State = LayerState | CoarseState
DTYPES = {"updated_scores": "float32", "decay_factors": "float32", "keep_mask": "bool"}


def output_problems(state: State, kept: list[list[int]], outputs: Mapping[str, Any]) -> list[str]:
    """`kept`: the answer, one list of tokens or pages a row; it has been judged right."""
    problems = []
    tokens = [kept_of(state, own) if isinstance(state, CoarseState) else own for own in kept]
    for name, given in outputs.items():
        own = np.asarray(given)
        if str(own.dtype) != DTYPES.get(name, "int32"):
            problems.append(f"{name} is of {own.dtype}")
        if state.policy.granularity != "head" and name in DTYPES:
            own = own[None]
        problem = CHECKS[name](state, tokens, own)
        if problem:
            problems.append(f"{name}: {problem}")
    return problems


def _equal(got: np.ndarray, wanted: Any, shape: tuple[int, ...]) -> str:
    wanted = np.array(wanted).reshape(shape)
    if got.shape != wanted.shape:
        return f"shaped {got.shape}, not {wanted.shape}"
    return "" if (got == wanted).all() else f"{got.tolist()} is not {wanted.tolist()}"


def _keep_mask(state: State, tokens: list[list[int]], got: np.ndarray) -> str:
    return _equal(got, reference.keep_mask(tokens, state.num_tokens), (len(tokens), state.num_tokens))


def _dropped_ranges(state: State, tokens: list[list[int]], got: np.ndarray) -> str:
    return _equal(got, reference.dropped_ranges(tokens, state.num_tokens), (-1, 3))


def _moves(state: State, tokens: list[list[int]], got: np.ndarray) -> str:
    return _equal(got, reference.moves(tokens), (-1, 3))


def _choice_order(state: State, tokens: list[list[int]], got: np.ndarray) -> str:
    if not isinstance(state, LayerState):
        return "not for rows that share an answer"
    wanted = reference.choice_order(state)
    if got.shape != wanted.shape:
        return f"shaped {got.shape}, not {wanted.shape}"
    for row, own, kept in zip(state.rows, got.tolist(), tokens, strict=True):
        order = [j for j in own if j != -1]
        if state.keeps_all or own[: len(order)] != order or sorted([*order, *row.always]) != kept:
            if own:
                return f"KV head {row.head}: {own} is no order of the contenders kept"
            continue
        scores, graph = score_bounds(state, row), state.policy.graph
        if row.graph is None:
            before = scores.before(order)
            problem = "certainly another" if before.T[np.triu_indices(len(order), 1)].any() else ""
        else:
            edges = edge_bounds(state, row, threshold=graph.threshold)
            problem = replay_order(scores, edges, [*row.graph.candidates], order, graph.strength)
            problem = problem if set(order) <= set(row.graph.candidates) else ""  # another cut at C
        if problem:
            return f"KV head {row.head}: {own}, reference {row.graph.order if row.graph else wanted.tolist()}: {problem}"
    return ""


def _updated_scores(state: State, tokens: list[list[int]], got: np.ndarray) -> str:
    wanted = reference.updated_scores(state)
    if isinstance(state, LayerState):
        ends = [(row, *_ends(worth(state, row))) for row in state.rows]
    elif state.policy.granularity == "head":
        ends = [(own.first, *_ends(worth(*own.members[0]))) for own in state.shared]
    else:
        ends = []
        for own in state.shared:
            worths = [worth(layer, row) for layer, row in own.members]
            units = token_units(own, worths, state.policy.combine)
            open_ones = np.any([one.sure != one.maybe for one in worths], axis=0)
            if own.votes:  # who is open may have votes, or be nobody's candidate
                wanted[0] = np.where(open_ones & np.isneginf(wanted[0]), 0.0, wanted[0])
            ends.append((own.first, np.where(open_ones & own.votes, -np.inf, units.low), units.high))
    return _within(state, got, wanted, ends)


def _ends(own: Worth) -> tuple[np.ndarray, np.ndarray]:
    return own.low, own.high


def _decay_factors(state: State, tokens: list[list[int]], got: np.ndarray) -> str:
    members = (
        [(state, row) for row in state.rows] if isinstance(state, LayerState) else [m for s in state.shared for m in s.members]
    )
    ends = [(row, *worth(layer, row).factors) for layer, row in members]
    return _within(state, got, reference.decay_factors(state), ends)


def _within(state: State, got: np.ndarray, wanted: np.ndarray, ends: Sequence[tuple[RowState, np.ndarray, np.ndarray]]) -> str:
    """Finite numbers between the ends, infinite ones as the reference has them."""
    if got.shape != wanted.shape:
        return f"shaped {got.shape}, not {wanted.shape}"
    got = got.astype(np.float64)
    for place, (_, *own) in enumerate(ends):
        fixed = np.isinf(wanted[place])
        low, high = (end + sign * (2 * UNIT * np.abs(end) + TINY) for end, sign in zip(own, (-1, 1), strict=True))
        low = np.where(fixed, wanted[place], np.minimum(low, LARGEST))
        high = np.where(fixed, wanted[place], np.where(high >= LARGEST * (1 - 4 * UNIT), np.inf, high))
        wrong = ~((got[place] >= low) & (got[place] <= high))
        if wrong.any():
            j = int(np.argmax(wrong))
            return f"row {place}, token {j}: {got[place, j]!r} is not {wanted[place, j]!r}, within {low[j]!r} and {high[j]!r}"
    return ""


CHECKS: Mapping[str, Callable[[State, list[list[int]], np.ndarray], str]] = {
    "updated_scores": _updated_scores,
    "keep_mask": _keep_mask,
    "decay_factors": _decay_factors,
    "choice_order": _choice_order,
    "dropped_ranges": _dropped_ranges,
    "moves": _moves,
}
