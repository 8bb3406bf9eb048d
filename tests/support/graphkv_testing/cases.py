"""Cases: small prompts and policies from everywhere the library's space has a corner; seeded, with readable ids.

A `Spec` is plain choices, drawn by a seeded generator (`seeded`), written by hand (`CORNERS`) or by hypothesis (`specs`);
`Case(spec)` makes the tensors. Every tensor exists twice: as torch gives it to the library, and as the float64 numpy
array of the very same values, for the reference.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from graphkv.terms.policy import Graph, Policy
from graphkv.terms.rope import Rope
from graphkv_testing.reference import LayerState, always_kept, layer_budgets, select_prompt

__all__ = ["CORNERS", "Case", "Spec", "corners", "seeded", "specs"]

Choose = Callable[[str, Sequence[Any]], Any]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


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


@dataclass
class Case:
    """A spec's tensors: `inputs()` for `graphkv.select`, `states()` from the reference."""

    spec: Spec
    policy: Policy = field(init=False)
    rope: Rope | None = field(init=False, default=None)
    arrays: dict[str, list[torch.Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Makes everything; the same spec always gives the same bits."""
        spec, rng = self.spec, np.random.default_rng([self.spec.seed, self.spec.tokens, 77])
        self.policy = spec.make_policy()
        window = min(self.policy.observation_window(), spec.tokens)
        positions = [_positions(spec, rng) for _ in range(spec.layers)]
        if spec.rope in ("full", "partial", "interleaved"):
            self.rope = _rope(spec)
        keys = [_keys(spec, rng) for _ in range(spec.layers)]
        pre_rope = self.policy.graph is not None and self.policy.graph.similarity == "pre_rope"
        if self.rope is not None and pre_rope:
            keys = [_rotated(key, where, self.rope) for key, where in zip(keys, positions, strict=True)]
            if spec.positions != "default":
                self.arrays["positions"] = [torch.from_numpy(where) for where in positions]
        self._put("keys", keys, spec.dtype)
        if spec.rope == "similarity_keys" and pre_rope:
            wide = dataclasses.replace(spec, head_dim=spec.head_dim + 3, seed=spec.seed + 1)
            self._put("similarity_keys", [_keys(wide, rng) for _ in range(spec.layers)], spec.dtype)
        query_heads = spec.kv_heads * spec.group
        if spec.importance == "queries":
            drawn = [rng.normal(size=(query_heads, window, spec.head_dim)) for _ in range(spec.layers)]
            self._put("queries", drawn, spec.dtype)
        elif spec.importance in ("attention", "attention_f16"):
            drawn = [_attention(query_heads, window, spec.tokens, rng) for _ in range(spec.layers)]
            self._put("attention", drawn, "f16" if spec.importance == "attention_f16" else "f32")
        elif spec.importance == "scores":
            drawn = [_scores(spec, rng) for _ in range(spec.layers)]
            self._put("scores", drawn, "f32" if spec.dtype == "bf16" else spec.dtype)

    def _put(self, role: str, arrays: list[np.ndarray], dtype: str) -> None:
        self.arrays[role] = [torch.from_numpy(array).to(DTYPES[dtype]) for array in arrays]

    def inputs(self, *, stacked: bool = True) -> dict[str, Any]:
        """Keyword arguments of `graphkv.select`; tensors stacked over the layers, or as lists of layers."""
        given: dict[str, Any] = {role: torch.stack(layers) if stacked else layers for role, layers in self.arrays.items()}
        return {**given, "policy": self.policy, "pinned": list(self.spec.pinned) or None, "rope": self.rope}

    def states(self, **changes: Any) -> list[LayerState]:
        """The reference's layers; `changes` replace arguments of `select_prompt`."""
        given = {role: [layer.double().numpy() for layer in layers] for role, layers in self.arrays.items()}
        return select_prompt(**{**given, "policy": self.policy, "pinned": self.spec.pinned, "rope": self.rope, **changes})


# --- the space ----------------------------------------------------------------------------------------------------------


def seeded(count: int, first: int = 0) -> Iterator[Spec]:
    """`count` specs, the same ones every time."""
    for seed in range(first, first + count):
        rng = np.random.default_rng([seed, 4242])

        def choose(_name: str, options: Sequence[Any], rng: np.random.Generator = rng) -> Any:
            return options[int(rng.integers(len(options)))]

        yield draw_spec(choose, seed)


@st.composite
def specs(draw: st.DrawFn, **fixed: Any) -> Spec:
    """The same space for hypothesis; `fixed` names fields of Spec to hold."""
    spec = draw_spec(lambda _name, options: draw(st.sampled_from(list(options))), draw(st.integers(0, 2**16)))
    return dataclasses.replace(spec, **fixed)


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


# --- the tensors ----------------------------------------------------------------------------------------------------------


def _keys(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """[Hkv, n, d]; clustered: a few directions with a little noise, so that neighbours above 0.9 exist."""
    shape = (spec.kv_heads, spec.tokens, spec.head_dim)
    keys = rng.normal(size=shape)
    if spec.keys == "random":
        return keys
    centres = rng.normal(size=(spec.kv_heads, max(2, spec.tokens // 6), spec.head_dim))
    which = rng.integers(centres.shape[1], size=spec.tokens)
    size = rng.uniform(0.5, 2.0, size=(spec.kv_heads, spec.tokens, 1))
    keys = size * (centres[:, which] + rng.choice([0.05, 0.2, 0.5], size=(spec.tokens, 1)) * keys)
    if spec.keys == "duplicated":
        alike = rng.integers(spec.tokens, size=(spec.tokens + 1) // 2)
        keys[:, rng.permutation(spec.tokens)[: len(alike)]] = keys[:, alike]
    elif spec.keys == "zeros":
        keys[:, rng.permutation(spec.tokens)[: max(1, spec.tokens // 4)]] = 0.0
    return keys


def _scores(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """[Hkv, n]."""
    scores = rng.gamma(1.0, size=(spec.kv_heads, spec.tokens))
    if spec.scores == "ties":
        return np.ceil(scores * 2) / 4
    if spec.scores == "zeros":
        return np.where(scores > 1.0, 0.25, 0.0)
    if spec.scores in ("negative", "mixed"):
        return scores - (10.0 if spec.scores == "negative" else 1.0)
    if spec.scores in ("padded", "sparse"):
        padding = rng.random(scores.shape) < (0.3 if spec.scores == "padded" else 0.9)
        return np.where(padding, -np.inf, scores)
    return scores


def _attention(query_heads: int, window: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """[Hq, w, n], each row a distribution over what its query sees."""
    logits = 2.0 * rng.normal(size=(query_heads, window, tokens))
    seen = np.arange(tokens) <= (tokens - window + np.arange(window))[:, None]
    weights = np.where(seen, np.exp(logits), 0.0)
    return weights / weights.sum(axis=-1, keepdims=True)


def _positions(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """[n] or [Hkv, n]: ascending, as a cache that has been cut before would have them."""
    shape = (spec.kv_heads, spec.tokens) if spec.positions == "per_head" else (spec.tokens,)
    if spec.positions == "default":
        return np.arange(spec.tokens)
    return np.cumsum(rng.integers(1, 9, size=shape), axis=-1)


def _rope(spec: Spec) -> Rope:
    rotary_dim = max(2, spec.head_dim // 2 // 2 * 2) if spec.rope == "partial" else spec.head_dim
    frequencies = tuple(10_000.0 ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2))
    return Rope(frequencies, rotary_dim, interleaved=spec.rope == "interleaved")


def _rotated(keys: np.ndarray, positions: np.ndarray, rope: Rope) -> np.ndarray:
    """As a model rotates them: (a, b) -> (a cos - b sin, b cos + a sin)."""
    half = rope.rotary_dim // 2
    first = np.arange(half) * 2 if rope.interleaved else np.arange(half)
    second = first + 1 if rope.interleaved else first + half
    angle = np.broadcast_to(positions, keys.shape[:2])[..., None] * np.array(rope.inv_freq)
    turned = keys.copy()
    turned[..., first] = keys[..., first] * np.cos(angle) - keys[..., second] * np.sin(angle)
    turned[..., second] = keys[..., second] * np.cos(angle) + keys[..., first] * np.sin(angle)
    return turned


# --- corners, by hand -------------------------------------------------------------------------------------------------------

_SCORED: dict[str, Any] = {"importance": "scores", "policy": (("budget", 7), ("scorer", "given"))}
_ONE_SHOT = (("neighbors", "auto"), ("threshold", 0.0), ("candidates", None))
_SEQUENTIAL = (("update", "sequential"), ("strength", 0.5), ("candidates", 2))
CORNERS: tuple[Spec, ...] = (
    Spec(name="one-token", tokens=1, kv_heads=1),
    Spec(name="budget-n", tokens=21, policy=(("budget", 21), ("window", 4))),
    Spec(name="budget-n-1", tokens=21, policy=(("budget", 20), ("window", 4))),
    Spec(name="budget-1", policy=(("budget", 1), ("window", 4))),
    Spec(name="budget-1-given", importance="scores", scores="ties", policy=(("budget", 1), ("scorer", "given")), graph=_ONE_SHOT),
    Spec(name="n-is-w", tokens=8, policy=(("budget", 5), ("window", 8))),
    Spec(name="n-below-w", tokens=7, policy=(("budget", 3),)),
    Spec(name="n-below-w-knorm", tokens=7, importance="none", policy=(("budget", 3), ("scorer", "knorm"), ("window", 9))),
    Spec(name="window-fills-budget", policy=(("budget", 8), ("window", 8))),
    Spec(name="overflow-sinks-window", policy=(("budget", 5), ("window", 4), ("sinks", 3))),
    Spec(name="overflow-pinned", pinned=((20, 23),), policy=(("budget", 5), ("window", 4), ("sinks", 3))),
    Spec(name="default-policy", tokens=79, policy=(("budget", 48),), kv_heads=1, group=8),
    Spec(name="paper", tokens=65, policy=(("budget", 20), ("window", 4)), graph=_ONE_SHOT, group=3),
    Spec(name="paper-3-rounds", tokens=65, policy=(("budget", 20), ("window", 4)), graph=(*_ONE_SHOT, ("rounds", 3))),
    Spec(name="all-equal-keys", keys="duplicated", tokens=3, **_SCORED),
    Spec(name="ties", scores="ties", **_SCORED),
    Spec(name="ties-base", scores="ties", graph=None, **_SCORED),
    Spec(name="ties-negative", scores="negative", graph=None, dtype="f16", **_SCORED),
    Spec(name="all-zero-scores", scores="zeros", graph=_ONE_SHOT, **_SCORED),
    Spec(name="all-zero-sequential", scores="zeros", graph=_SEQUENTIAL, **_SCORED),
    Spec(name="ties-sequential", scores="ties", keys="duplicated", graph=_SEQUENTIAL, **_SCORED),
    Spec(name="full-strength-duplicates", keys="duplicated", graph=(*_ONE_SHOT, ("strength", 1.0)), **_SCORED),
    Spec(name="full-strength-sequential", keys="duplicated", graph=(("update", "sequential"), ("strength", 1.0)), **_SCORED),
    Spec(name="padding", scores="padded", **_SCORED),
    Spec(name="padding-ragged", scores="sparse", kv_heads=3, **_SCORED),
    Spec(name="padding-ragged-sequential", scores="sparse", kv_heads=3, graph=_SEQUENTIAL, **_SCORED),
    Spec(name="padding-always-kept", scores="sparse", pinned=((3, 6),), **_SCORED),
    Spec(name="padding-keeps-all", scores="sparse", tokens=7, **_SCORED),
    Spec(name="zero-keys", keys="zeros", graph=_ONE_SHOT),
    Spec(name="zero-keys-knorm", keys="zeros", importance="none", policy=(("budget", 9), ("scorer", "knorm")), graph=_SEQUENTIAL),
    Spec(name="zero-keys-evict", keys="zeros", graph=(*_ONE_SHOT, ("signal", "evict"))),
    Spec(name="evict", graph=(("signal", "evict"), ("threshold", 0.5), ("source_ratio", 0.6))),
    Spec(name="evict-strength-0", graph=(("signal", "evict"), ("strength", 0.0), ("threshold", 0.5))),
    Spec(name="enhance-overflow", graph=(*_ONE_SHOT, ("signal", "enhance"), ("rounds", 64), ("source_ratio", 1.0)), **_SCORED),
    Spec(name="enhance-zeros", scores="zeros", graph=(*_ONE_SHOT, ("signal", "enhance"), ("rounds", 64)), **_SCORED),
    Spec(name="decay-underflow", graph=(*_ONE_SHOT, ("rounds", 64), ("source_ratio", 0.6)), **_SCORED),
    Spec(name="more-neighbors-than-candidates", graph=(("neighbors", 100), ("threshold", 0.0), ("candidates", 1))),
    Spec(name="pyramid-3", layers=3, tokens=65, policy=(("budget", 16), ("window", 4), ("budget_allocation", "pyramid"))),
    Spec(name="pyramid-short", layers=3, tokens=21, policy=(("budget", 16), ("window", 4), ("budget_allocation", "pyramid"))),
    Spec(name="pyramid-capped", layers=3, tokens=29, policy=(("budget", 16), ("window", 4), ("budget_allocation", "pyramid"))),
    Spec(name="page-align", tokens=61, policy=(("budget", 17), ("window", 4), ("page_align", 8))),
    Spec(name="gqa-8", kv_heads=1, group=8, dtype="bf16", graph=_ONE_SHOT),
    Spec(name="gqa-3-max-pooling", kv_heads=3, group=3, policy=(("budget", 9), ("window", 4), ("pooling", "max"))),
    Spec(name="caller-scores-under-snapkv", importance="scores", policy=(("budget", 9),)),
    Spec(name="sequential-default", tokens=65, rope="full", policy=(("budget", 20), ("window", 4), ("sinks", 4)),
         graph=(("update", "sequential"), ("similarity", "pre_rope"), ("strength", 0.1), ("candidates", 2))),
    Spec(name="sequential-bf16", tokens=65, rope="full", dtype="bf16", policy=(("budget", 20), ("window", 4), ("sinks", 4)),
         graph=(("update", "sequential"), ("similarity", "pre_rope"), ("strength", 0.1), ("candidates", 2))),
)  # fmt: skip


def corners() -> tuple[Spec, ...]:
    """The corners written by hand, with distinct seeds."""
    return tuple(dataclasses.replace(spec, seed=1000 + place) for place, spec in enumerate(CORNERS))
