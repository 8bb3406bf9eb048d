"""Steps 2 to 7 of the graph for one row, and what they need of its keys. Part of the reference: numpy, loops, float64."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphkv.terms.policy import Graph
from graphkv.terms.rope import Rope
from graphkv_testing.states import GraphState

__all__ = ["LARGEST", "SNAP", "best_first", "clamped", "cosines", "propagates", "run_graph", "unrotated"]

SNAP = 1.0 - 2.0**-16  # a cosine at or above it counts as 1
LARGEST = float(np.finfo(np.float32).max)


def propagates(graph: Graph) -> bool:
    """Whether the graph is run at all; else the answer is exactly the base method's."""
    if graph.strength == 0 and graph.signal != "evict":
        return False
    return graph.update == "sequential" or (graph.source_ratio > 0 and graph.rounds > 0)


def run_graph(
    shifted: np.ndarray, contenders: Sequence[int], cosine: np.ndarray, graph: Graph, *, budget: int, contended: int
) -> GraphState:
    """From scores [n] (shifted already) and raw cosines [n, n]."""
    ranked = best_first(contenders, shifted)
    if graph.candidates is not None:
        ranked = ranked[: max(contended, math.ceil(graph.candidates * budget - 1e-9))]
    edges = clamped(cosine)
    if graph.update == "sequential":
        return _sequential(shifted, ranked, edges, graph.strength, contended)
    sources = ranked[: _source_count(graph, budget, contended)]
    per_source: float = math.inf
    if graph.neighbors == "auto":
        per_source = math.ceil(budget / len(sources)) if sources else 0
    elif graph.neighbors is not None:
        per_source = graph.neighbors
    neighbours = []
    for source in sources:
        near = [j for j in ranked if j not in sources and edges[source, j] > 0 and edges[source, j] >= graph.threshold]
        near = best_first(near, edges[source])
        neighbours.append(near if per_source == math.inf else near[: int(per_source)])
    evicted = {j for near in neighbours for j in near} if graph.signal == "evict" else set()
    updated, factors = np.full(len(shifted), np.nan), np.ones(len(shifted))
    for j in ranked:
        touching = [edges[source, j] for source, near in zip(sources, neighbours, strict=True) if j in near]
        if graph.signal == "evict":
            updated[j], factors[j] = shifted[j], 0.0 if j in evicted else 1.0
        else:
            updated[j], factors[j] = _updated(shifted[j], touching, graph), _updated(1.0, touching, graph)
    staying = best_first([j for j in ranked if j not in evicted], updated)
    leaving = best_first(evicted, updated)
    for rank, j in enumerate(leaving):
        updated[j] = -1.0 - rank
    return GraphState(ranked, sources, edges, neighbours, evicted, updated, factors, (staying + leaving)[:contended])


def _updated(score: float, touching: Sequence[float], graph: Graph) -> float:
    """Step 6 for one token; `touching`: its edges, in source order."""
    sign = 1.0 if graph.signal == "enhance" else -1.0
    if graph.update == "additive":
        return min(score + sign * sum(graph.strength * edge * score for edge in touching), LARGEST)
    for _ in range(graph.rounds):
        for edge in touching:
            score = min(score * (1.0 + sign * graph.strength * edge), LARGEST)
    return score


def _sequential(shifted: np.ndarray, ranked: list[int], edges: np.ndarray, strength: float, contended: int) -> GraphState:
    """Every kept token a source at once, in logs; reported scores are s * exp(sum of the log factors)."""
    logs = dict.fromkeys(ranked, 0.0)
    remaining, order, steps, last = sorted(ranked), [], [], {}
    updated, factors = np.full(len(shifted), np.nan), np.ones(len(shifted))
    while remaining and len(order) < contended:
        x = {j: _log(shifted[j]) + logs[j] for j in remaining}
        best = min(remaining, key=lambda j: (-x[j], j))  # used at once
        steps.append((best, x))
        last[best] = x[best]
        order.append(best)
        remaining.remove(best)
        for j in remaining:
            logs[j] += _log(1.0 - strength * edges[best, j])
    for j in ranked:
        last.setdefault(j, _log(shifted[j]) + logs[j])
        factors[j] = math.exp(logs[j])
        updated[j] = shifted[j] * factors[j]
    return GraphState(ranked, [], edges, [], set(), updated, factors, order, steps, last)


def cosines(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Raw cosines [n, n] of vectors [n, x], and the same of the absolute values; a zero vector has 0 with everything."""
    norms = np.sqrt((vectors * vectors).sum(axis=-1))
    units = vectors / np.where(norms > 0, norms, 1.0)[:, None]
    return units @ units.T, np.abs(units) @ np.abs(units).T


def clamped(cosine: np.ndarray) -> np.ndarray:
    """Step 4: into [0, 1], and what is 1 up to rounding is 1."""
    return np.where(cosine >= SNAP, 1.0, np.clip(cosine, 0.0, 1.0))


def unrotated(keys: np.ndarray, positions: np.ndarray, rope: Rope) -> np.ndarray:
    """Keys [n, d] before rotary embedding: pair i of token t turned back by position_t * inv_freq[i]."""
    plain = keys.copy()
    half = rope.rotary_dim // 2
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        for t in range(len(keys)):
            angle = float(positions[t]) * rope.inv_freq[i]
            plain[t, a] = keys[t, a] * math.cos(angle) + keys[t, b] * math.sin(angle)
            plain[t, b] = keys[t, b] * math.cos(angle) - keys[t, a] * math.sin(angle)
    return plain


def best_first(tokens: Any, values: np.ndarray) -> list[int]:
    """By value descending, then index ascending: the one order there is."""
    return sorted(tokens, key=lambda j: (-values[j], j))


def _source_count(graph: Graph, budget: int, contended: int) -> int:
    if graph.source_ratio == 0:
        return 0
    return min(max(1, math.floor(graph.source_ratio * budget + 1e-9)), contended)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
