"""The algorithm of docs/algorithm.md once more: float64, plain numpy, loops where the text has steps.

Judges the library, so it must know nothing of it: only the words (`Policy`, `Rope`) are shared, and even their derived
numbers (budgets, counts of sources, always-kept tokens) are worked out here again from the plain fields. Slow on purpose.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphkv.terms.policy import Graph, Policy
from graphkv.terms.rope import Rope
from graphkv_testing.importance import Importance, layer_importance

__all__ = [
    "SNAP",
    "GraphState",
    "LayerState",
    "RowState",
    "always_kept",
    "base_order",
    "best_first",
    "clamped",
    "cosines",
    "layer_budgets",
    "run_graph",
    "select_layer",
    "select_prompt",
    "unrotated",
]

SNAP = 1.0 - 2.0**-16  # a cosine at or above it counts as 1
LARGEST = float(np.finfo(np.float32).max)


@dataclass
class GraphState:
    """What the graph did to one row. Token ids throughout; matrices are [n, n] over all tokens.

    candidates, sources: best first. edges: cosines clamped and snapped. neighbours: one list a source, most similar
    first. evicted: set of token ids. updated: [n], NaN where a token is no candidate. order: contenders kept, in the
    order of choice (sequential), or best first. steps: sequential only, (token, x of every candidate before the choice).
    """

    candidates: list[int]
    sources: list[int]
    edges: np.ndarray
    neighbours: list[list[int]]
    evicted: set[int]
    updated: np.ndarray
    order: list[int]
    steps: list[tuple[int, dict[int, float]]] = field(default_factory=list)


@dataclass
class RowState:
    """One KV head of one layer: every number on the way to its answer.

    base: scores as the scorer gives them, float64 [n]. shifted: after step 1. cosine: raw cosines [n, n] (unclamped), or
    None where nothing propagates; absolute: the same with the absolute values of all products, for error bounds.
    kept: ascending, always-kept tokens included. base_kept: contenders that graph=None keeps.
    """

    head: int
    num_tokens: int
    budget: int
    always: list[int]
    contenders: list[int]
    base: np.ndarray
    shifted: np.ndarray
    kept: list[int]
    base_kept: list[int]
    cosine: np.ndarray | None = None
    absolute: np.ndarray | None = None
    graph: GraphState | None = None

    @property
    def contended(self) -> int:
        """B_sel = B - A."""
        return self.budget - len(self.always)


@dataclass
class LayerState:
    """One layer: its rows, its figures, and what the judge needs to know of the arithmetic behind them."""

    layer: int
    policy: Policy
    budget: int
    rows: list[RowState]
    importance: Importance
    head_dim: int
    vector_dim: int
    unrotated: bool
    kept_score_ratio: float
    changed: int

    @property
    def keeps_all(self) -> bool:
        """n <= B: nothing competes."""
        return self.rows[0].num_tokens <= self.budget


def select_prompt(
    keys: Sequence[Any],
    *,
    policy: Policy,
    queries: Sequence[Any] | None = None,
    attention: Sequence[Any] | None = None,
    scores: Sequence[Any] | None = None,
    similarity_keys: Sequence[Any] | None = None,
    positions: Sequence[Any] | None = None,
    pinned: Sequence[tuple[int, int]] | None = None,
    rope: Rope | None = None,
) -> list[LayerState]:
    """All layers of one prompt; every argument has one entry a layer, shaped as `graphkv.select` wants them."""
    num_layers, num_tokens = len(keys), np.shape(keys[0])[1]
    budgets = layer_budgets(policy, num_tokens, num_layers, pinned or (), caller_scores=scores is not None)
    states = []
    for layer in range(num_layers):
        own = {
            "queries": queries,
            "attention": attention,
            "scores": scores,
            "similarity_keys": similarity_keys,
            "positions": positions,
        }
        own = {name: None if given is None else np.asarray(given[layer], dtype=np.float64) for name, given in own.items()}
        key = np.asarray(keys[layer], dtype=np.float64)
        states.append(
            select_layer(key, layer=layer, budget=budgets[layer], policy=policy, pinned=pinned or (), rope=rope, **own)
        )
    return states


def select_layer(
    keys: np.ndarray,
    *,
    layer: int,
    budget: int,
    policy: Policy,
    queries: np.ndarray | None = None,
    attention: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    similarity_keys: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    pinned: Sequence[tuple[int, int]] = (),
    rope: Rope | None = None,
) -> LayerState:
    """One layer with its own budget B. keys [Hkv, n, d]; the rest as `graphkv.select` describes it, one layer's part."""
    kv_heads, num_tokens, head_dim = keys.shape
    window = _window(policy, caller_scores=scores is not None)
    importance = layer_importance(
        policy, keys, queries=queries, attention=attention, scores=scores, window=min(window, num_tokens)
    )
    always = always_kept(num_tokens, budget, pinned=pinned, sinks=policy.sinks or 0, window=window)
    graph = policy.graph if policy.graph is not None and _propagates(policy.graph) else None
    where = np.broadcast_to(np.arange(num_tokens) if positions is None else positions, (kv_heads, num_tokens))
    rows, kept_mass, all_mass, changed, turned_back = [], 0.0, 0.0, 0, False
    for head in range(kv_heads):
        row = _start_row(head, num_tokens, budget, always, importance.values[head])
        row.base_kept = base_order(row)[: row.contended]
        chosen = row.base_kept
        if graph is not None and num_tokens > budget:
            vectors = keys[head]
            if graph.similarity == "pre_rope":
                if similarity_keys is not None:
                    vectors = similarity_keys[head]
                else:
                    vectors = unrotated(vectors, where[head], rope)
                    turned_back = True
            row.cosine, row.absolute = cosines(vectors)
            row.graph = run_graph(row.shifted, row.contenders, row.cosine, graph, budget=budget, contended=row.contended)
            chosen = row.graph.order
        row.kept = sorted([*always, *chosen])
        if num_tokens > budget:
            kept_mass += sum(row.shifted[j] for j in chosen)
            all_mass += sum(row.shifted[j] for j in row.contenders)
            changed += len(set(chosen) - set(row.base_kept))
        rows.append(row)
    ratio = kept_mass / all_mass if all_mass > 0 else 1.0
    vector_dim = head_dim if similarity_keys is None else similarity_keys.shape[-1]
    return LayerState(layer, policy, budget, rows, importance, head_dim, vector_dim, turned_back, ratio, changed)


# --- what is kept whatever its score, and how many --------------------------------------------------------------------


def always_kept(
    num_tokens: int, budget: int, *, pinned: Sequence[tuple[int, int]] = (), sinks: int = 0, window: int = 0
) -> list[int]:
    """Token ids, ascending. Over the budget: the pinned first, then sinks from the front, then the window from the end."""
    if num_tokens <= budget:
        return list(range(num_tokens))
    kept: set[int] = set()
    for start, stop in pinned:
        kept.update(range(start, stop))
    if len(kept) > budget:
        raise ValueError(f"{len(kept)} pinned tokens exceed the budget {budget}")
    for token in [*range(min(sinks, num_tokens)), *reversed(range(num_tokens - min(window, num_tokens), num_tokens))]:
        if len(kept) < budget:
            kept.add(token)
    return sorted(kept)


def layer_budgets(
    policy: Policy, num_tokens: int, num_layers: int, pinned: Sequence[tuple[int, int]] = (), *, caller_scores: bool = False
) -> list[int]:
    """B of every layer: the allocation's, then page_align's. A layer whose B is at least n keeps everything."""
    n, given = num_tokens, policy.budget
    total = given if isinstance(given, int) else max(1, math.floor(given * n + 1e-9))
    budgets = [total] * num_layers
    if policy.budget_allocation == "pyramid":
        window = _window(policy, caller_scores=caller_scores)
        kept = len(always_kept(n, total, pinned=pinned, sinks=policy.sinks or 0, window=window))
        contended = total - kept
        if n >= total and contended >= 1 and n >= 2 * contended and num_layers > 1:
            low = contended // 20
            high = 2 * contended - low
            if high >= n - kept:
                high = n - kept
                low = 2 * contended - high
            step = (high - low) // (num_layers - 1)
            budgets = [kept + high - layer * step for layer in range(num_layers)]
    if policy.page_align is not None:
        p = policy.page_align
        budgets = [n - p * ((n - budget) // p) if n > budget else budget for budget in budgets]
    return budgets


# --- the graph ---------------------------------------------------------------------------------------------------------


def run_graph(
    shifted: np.ndarray, contenders: Sequence[int], cosine: np.ndarray, graph: Graph, *, budget: int, contended: int
) -> GraphState:
    """Steps 2 to 7 for one row, from scores [n] (shifted already) and raw cosines [n, n]."""
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
    updated = np.full(len(shifted), np.nan)
    for j in ranked:
        touching = [edges[source, j] for source, near in zip(sources, neighbours, strict=True) if j in near]
        updated[j] = shifted[j] if graph.signal == "evict" else _updated(shifted[j], touching, graph)
    staying = best_first([j for j in ranked if j not in evicted], updated)
    leaving = best_first(evicted, updated)
    for rank, j in enumerate(leaving):
        updated[j] = -1.0 - rank
    return GraphState(ranked, sources, edges, neighbours, evicted, updated, (staying + leaving)[:contended])


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
    remaining, order, steps = sorted(ranked), [], []
    updated = np.full(len(shifted), np.nan)
    while remaining and len(order) < contended:
        x = {j: _log(shifted[j]) + logs[j] for j in remaining}
        best = min(remaining, key=lambda j: (-x[j], j))  # used at once
        steps.append((best, x))
        order.append(best)
        remaining.remove(best)
        updated[best] = shifted[best] * math.exp(logs[best])
        for j in remaining:
            logs[j] += _log(1.0 - strength * edges[best, j])
    for j in remaining:
        updated[j] = shifted[j] * math.exp(logs[j])
    return GraphState(ranked, [], edges, [], set(), updated, order, steps)


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


def base_order(row: RowState) -> list[int]:
    """The contenders as the base method ranks them."""
    return best_first(row.contenders, row.base)


def _start_row(head: int, num_tokens: int, budget: int, always: list[int], base: np.ndarray) -> RowState:
    """Contenders and step 1."""
    outside = set(always)
    contenders = [j for j in range(num_tokens) if j not in outside and base[j] > -math.inf]
    least = min((base[j] for j in contenders), default=0.0)
    shifted = base - least if least < 0 else base.copy()
    return RowState(head, num_tokens, budget, always, contenders, base, shifted, [], [])


def _source_count(graph: Graph, budget: int, contended: int) -> int:
    if graph.source_ratio == 0:
        return 0
    return min(max(1, math.floor(graph.source_ratio * budget + 1e-9)), contended)


def _propagates(graph: Graph) -> bool:
    """Whether the graph is run at all; else the answer is exactly the base method's."""
    if graph.strength == 0 and graph.signal != "evict":
        return False
    return graph.update == "sequential" or (graph.source_ratio > 0 and graph.rounds > 0)


def _window(policy: Policy, *, caller_scores: bool) -> int:
    """The policy's if set; else the scorer's own, which does not run where the caller scores."""
    if policy.window is not None:
        return policy.window
    return 32 if policy.scorer == "snapkv" and not caller_scores else 0


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
