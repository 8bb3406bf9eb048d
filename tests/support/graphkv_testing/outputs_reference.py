"""What an answer holds on request, from the reference's numbers; and what follows from an answer's tokens alone."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from graphkv_testing.graph_steps import best_first
from graphkv_testing.states import CoarseState, LayerState, RowState

__all__ = ["choice_order", "decay_factors", "dropped_ranges", "keep_mask", "kept_tokens", "moves", "updated_scores"]

State = LayerState | CoarseState


def updated_scores(state: State) -> np.ndarray:
    """[Hkv, n], or [1, n] where rows share the answer: +inf always kept, -inf no contender."""
    if isinstance(state, LayerState):
        rows = [(row, row.values) for row in state.rows]
    elif state.policy.granularity == "head":
        rows = [(shared.first, shared.first.values) for shared in state.shared]
    else:
        rows = [(shared.first, shared.values) for shared in state.shared]
    scores = np.array([values for _, values in rows])
    for place, (row, _) in enumerate(rows):
        scores[place, row.always] = math.inf
    return scores


def decay_factors(state: State) -> np.ndarray:
    """[Hkv, n]: 1 where the graph did nothing."""
    return np.array([np.ones(row.num_tokens) if row.graph is None else row.graph.factors for row in _rows(state)])


def choice_order(state: LayerState) -> np.ndarray:
    """[Hkv, B - A], filled up with -1; nothing where all are kept."""
    width = 0 if state.keeps_all else state.rows[0].contended
    found = np.full((len(state.rows), width), -1)
    for place, row in enumerate(state.rows if width else []):
        order = best_first(row.contenders, row.base)[:width] if row.graph is None else row.graph.order
        found[place, : len(order)] = order
    return found


def _rows(state: State) -> list[RowState]:
    return state.rows if isinstance(state, LayerState) else [row for own in state.shared for _, row in own.members]


# --- what follows from the tokens ---------------------------------------------------------------------------------------


def kept_tokens(state: State) -> list[list[int]]:
    """The tokens kept, one list a row of the answer."""
    if isinstance(state, LayerState):
        return [row.kept for row in state.rows]
    return [shared.kept for shared in state.shared]


def keep_mask(kept: Sequence[Iterable[int]], num_tokens: int) -> np.ndarray:
    """bool, a row of [n] each."""
    mask = np.zeros((len(kept), num_tokens), dtype=bool)
    for place, tokens in enumerate(kept):
        for j in tokens:
            mask[place, j] = True
    return mask


def dropped_ranges(kept: Sequence[Iterable[int]], num_tokens: int) -> list[list[int]]:
    """(row, start, stop) of every longest run of tokens not kept, ascending."""
    found = []
    for place, tokens in enumerate(kept):
        staying, start = set(tokens), None
        for j in range(num_tokens + 1):
            gone = j < num_tokens and j not in staying
            if gone and start is None:
                start = j
            if not gone and start is not None:
                found.append([place, start, j])
                start = None
    return found


def moves(kept: Sequence[Iterable[int]]) -> list[list[int]]:
    """(row, source, destination) of every kept token that has to move for the kept ones to be in front."""
    return [
        [place, source, destination]
        for place, tokens in enumerate(kept)
        for destination, source in enumerate(sorted(tokens))
        if source != destination
    ]
