"""What the bounds leave open at the cuts of one row: which sets of candidates and sources arithmetic may have found."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from graphkv.terms.policy import Graph
from graphkv_testing.bounds import Scores
from graphkv_testing.graph_steps import best_first
from graphkv_testing.states import RowState

__all__ = ["cut", "suited", "tops", "worlds"]

MOST_SOURCES = 64


def worlds(graph: Graph, row: RowState, scores: Scores) -> Iterator[tuple[list[int], list[int]]]:
    """Every (candidates, sources) that the bounds allow, the reference's own first where it is certain."""
    ran = row.graph
    for candidates in tops(row.contenders, scores.before(row.contenders), len(ran.candidates)):
        if graph.update == "sequential":
            yield candidates, []
            continue
        for sources in tops(candidates, scores.before(candidates), len(ran.sources)):
            yield candidates, sources


def suited(graph: Graph, row: RowState, scores: Scores, chosen: set[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The likeliest worlds where too many tokens are open at a cut to try all: that of an implementation which ranks what
    float32, or float64, leaves of the shifted scores; and those in which the chosen tokens are candidates, the rest being filled up in the
    reference's order, or by index as among ties."""
    for values in (row.shifted.astype(np.float32), row.shifted):
        ranked = best_first(row.contenders, values)[: len(row.graph.candidates)]
        yield sorted(ranked), sorted(ranked[: len(row.graph.sources)])
    before, count = scores.before(row.contenders), len(row.graph.candidates)
    inside, open_ones = cut(row.contenders, before, count)
    place = {j: i for i, j in enumerate(row.contenders)}
    ahead = {j: {i for i in open_ones if before[place[i], place[j]]} for j in open_ones}
    wanted = {i for j in open_ones if j in chosen for i in (j, *ahead[j])}
    if len(open_ones) + len(inside) == count or len(inside) + len(wanted) > count:
        return
    for order in (sorted(open_ones, key=lambda j: (-row.shifted[j], j)), open_ones):
        some = set(wanted)
        while len(inside) + len(some) < count:
            some.add(next(j for j in order if j not in some and ahead[j] <= some))
        candidates = sorted([*inside, *some])
        if graph.update == "sequential":
            yield candidates, []
        else:
            for sources in itertools.islice(tops(candidates, scores.before(candidates), len(row.graph.sources)), MOST_SOURCES):
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
