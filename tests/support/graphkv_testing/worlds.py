"""What the bounds leave open at the cuts of one row: which sets of candidates and sources arithmetic may have found."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from graphkv.terms.policy import Graph
from graphkv_testing.bounds import Scores
from graphkv_testing.states import RowState

__all__ = ["cut", "tops", "worlds"]


def worlds(graph: Graph, row: RowState, scores: Scores) -> Iterator[tuple[list[int], list[int]]]:
    """Every (candidates, sources) that the bounds allow, the reference's own first where it is certain."""
    ran = row.graph
    for candidates in tops(row.contenders, scores.before(row.contenders), len(ran.candidates)):
        if graph.update == "sequential":
            yield candidates, []
            continue
        for sources in tops(candidates, scores.before(candidates), len(ran.sources)):
            yield candidates, sources


def tops(tokens: Sequence[int], before: np.ndarray, count: int) -> Iterator[list[int]]:
    """Every set of the `count` first tokens that the partial order `before` allows."""
    inside, open_ones = cut(tokens, before, count)
    place = {j: i for i, j in enumerate(tokens)}
    for some in itertools.combinations(open_ones, count - len(inside)):
        rest = np.array([place[j] for j in open_ones if j not in some], dtype=int)
        if not before[np.ix_(rest, np.array([place[j] for j in some], dtype=int))].any():
            yield sorted([*inside, *some])


def cut(tokens: Sequence[int], before: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    """Tokens certainly among the first `count`, and those that may be."""
    others = len(tokens) - 1
    after, ahead = before.sum(axis=1), before.sum(axis=0)
    inside = [j for i, j in enumerate(tokens) if others - after[i] < count]
    open_ones = [j for i, j in enumerate(tokens) if others - after[i] >= count and ahead[i] < count]
    return inside, open_ones
