"""What a case is, as plain choices, and one way to draw them: for the seeded cases and for hypothesis alike.

Knows policies, not tensors.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graphkv.terms.policy import Graph, Policy
from graphkv_testing.budgets_reference import always_kept, layer_budgets

__all__ = ["Choose", "Spec", "draw_spec"]

Choose = Callable[[str, Sequence[Any]], Any]


@dataclass(frozen=True)
class Spec:
    """The choices that make a case. `policy` and `graph` hold only the fields to set; `graph` None is no graph at all.

    keys: clustered, duplicated, zeros (some zero keys), random. importance: queries, attention, attention_f16, scores,
    none. scores: positive, ties, negative, mixed, zeros, padded (some -inf), sparse (all but a few -inf).
    rope: None, full, partial, interleaved, or similarity_keys. positions: default, gaps, per_head.
    """

    tokens: int = 33
    layers: int = 1
    kv_heads: int = 2
    group: int = 1
    head_dim: int = 8
    dtype: str = "f32"
    keys: str = "clustered"
    importance: str = "queries"
    scores: str = "positive"
    policy: tuple[tuple[str, Any], ...] = (("budget", 9), ("window", 4))
    graph: tuple[tuple[str, Any], ...] | None = ()
    rope: str | None = None
    positions: str = "default"
    pinned: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    name: str = ""

    def make_policy(self) -> Policy:
        """The policy these choices name."""
        return Policy(**dict(self.policy), graph=None if self.graph is None else Graph(**dict(self.graph)))

    @property
    def id(self) -> str:
        """For pytest: what a reader wants to know of a case, shortest first."""
        graph = None if self.graph is None else Graph(**dict(self.graph))
        policy = self.make_policy()
        parts = [self.name or f"s{self.seed}", policy.scorer, self.importance, f"n{self.tokens}", f"B{policy.budget}"]
        if policy.budget_allocation != "uniform":
            parts.append(policy.budget_allocation)
        parts += [f"h{self.kv_heads}x{self.group}", self.dtype, self.keys]
        if self.importance == "scores":
            parts.append(self.scores)
        if graph is None:
            parts.append("base")
        else:
            parts += [graph.update if graph.signal == "decay" else f"{graph.signal}-{graph.update}"]
            parts += [graph.similarity, f"C{graph.candidates and f'{graph.candidates:g}'}"]
        return "-".join(parts)


def draw_spec(choose: Choose, seed: int) -> Spec:
    """One spec; `choose(name, options)` decides everything."""
    tokens = choose("tokens", (1, 2, 3, 7, 13, 17, 29, 31, 33, 40, 47, 61, 65, 79))
    scorer = choose("scorer", ("snapkv", "snapkv", "snapkv", "knorm", "given"))
    options = {
        "snapkv": ("queries", "queries", "attention", "attention_f16", "scores"),
        "knorm": ("none", "none", "scores"),
        "given": ("scores",),
    }
    layers = choose("layers", (1, 1, 2, 3))
    window = choose("window", (1, 3, 4, 8, None) if scorer == "snapkv" else (None, None, 0, 2, 5))
    budgets = (
        1,
        2,
        5,
        7,
        9,
        12,
        16,
        20,
        max(1, tokens // 3),
        max(1, tokens // 2),
        max(1, tokens - 1),
        tokens + 3,
        0.1,
        0.37,
        0.6,
    )
    policy: dict[str, Any] = {
        "budget": choose("budget", budgets),
        "scorer": scorer,
        "budget_allocation": choose("budget_allocation", ("uniform", "uniform", "pyramid")) if layers > 1 else "uniform",
        "window": window,
        "sinks": choose("sinks", (None, None, 0, 1, 3)),
        "page_align": choose("page_align", (None, None, None, None, 1, 3, 8)),
    }
    if scorer == "snapkv":
        policy["pool_width"] = choose("pool_width", (None, 1, 3, 5))
        policy["pooling"] = choose("pooling", ("avg", "avg", "max"))
    graph = _draw_graph(choose)
    rope = None
    if graph is not None and graph.get("similarity") == "pre_rope":
        rope = choose("rope", ("full", "partial", "interleaved", "similarity_keys"))
    spec = Spec(
        tokens=tokens,
        layers=layers,
        kv_heads=choose("kv_heads", (1, 2, 3)),
        group=choose("group", (1, 3, 8)),
        head_dim=choose("head_dim", (4, 6, 8, 16, 24)),
        dtype=choose("dtype", ("f32", "f16", "bf16")),
        keys=choose("keys", ("clustered", "clustered", "clustered", "duplicated", "zeros", "random")),
        importance=choose("importance", options[scorer]),
        scores=choose("scores", ("positive", "ties", "negative", "mixed", "zeros", "padded", "sparse")),
        policy=tuple((name, value) for name, value in policy.items() if value is not None),
        graph=None if graph is None else tuple(graph.items()),
        rope=rope,
        positions=choose("positions", ("default", "default", "gaps", "per_head")),
        seed=seed,
    )
    return dataclasses.replace(spec, pinned=_draw_pinned(choose, spec))


def _draw_graph(choose: Choose) -> dict[str, Any] | None:
    update = choose("update", ("product", "product", "additive", "sequential", "sequential", "none"))
    if update == "none":
        return None
    graph: dict[str, Any] = {
        "update": update,
        "strength": choose("strength", (1.0, 1.0, 0.5, 0.25, 0.1, 0.0)),
        "candidates": choose("candidates", (None, 1, 1.5, 2, 4)),
        "similarity": choose("similarity", ("post_rope", "post_rope", "pre_rope")),
    }
    if update == "sequential":
        return graph
    graph["neighbors"] = choose("neighbors", (None, "auto", "auto", 1, 3, 100))
    graph["threshold"] = choose("threshold", (0.9, 0.9, 0.5, 0.97, 1.0) if graph["neighbors"] is None else (0.0, 0.0, 0.5, 0.9))
    graph["source_ratio"] = choose("source_ratio", (0.3, 0.3, 0.05, 0.6, 1.0, 0.0))
    graph["signal"] = choose("signal", ("decay", "decay", "decay", "enhance", "evict"))
    if update == "product":
        graph["rounds"] = choose("rounds", (1, 1, 3, 0, 64))
    return graph


def _draw_pinned(choose: Choose, spec: Spec) -> tuple[tuple[int, int], ...]:
    """Ranges that fit the least budget of any layer; none where they cannot."""
    kind = choose("pinned", ("none", "none", "one", "two", "overlapping", "last"))
    n = spec.tokens
    ranges = {
        "none": (),
        "one": ((n // 2, n // 2 + 1),),
        "two": ((0, 1), (n // 3, n // 3 + 2)),
        "overlapping": ((n // 3, n // 2 + 1), (n // 2, n // 2 + 2)),
        "last": ((n - 1, n),),
    }[kind]
    ranges = tuple((start, min(stop, n)) for start, stop in ranges if start < min(stop, n))
    total = len({token for start, stop in ranges for token in range(start, stop)})
    policy = dataclasses.replace(spec.make_policy(), page_align=None)
    try:
        least = min(layer_budgets(policy, n, spec.layers, ranges, caller_scores=spec.importance == "scores"))
        always_kept(n, least, pinned=ranges)
    except ValueError:
        return ()
    return ranges if total <= least or n <= least else ()
