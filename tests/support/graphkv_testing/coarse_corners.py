"""Cases written by hand, beside `graphkv_testing.corners`: what rows, pages and budgets share at its corners, and the scorer
whose inputs are its own."""

import dataclasses
from typing import Any

from graphkv_testing.spec import Spec

__all__ = ["coarse_corners", "expected"]

_ONE_SHOT = (("neighbors", "auto"), ("threshold", 0.0), ("candidates", None))
_SEQUENTIAL = (("update", "sequential"), ("strength", 0.5), ("candidates", 2))
_DEFAULT = (("update", "sequential"), ("similarity", "pre_rope"), ("strength", 0.1), ("candidates", 2))
Fields = tuple[tuple[str, Any], ...]


def _policy(budget: float, *, window: int | None = 4, **fields: Any) -> Fields:
    return (("budget", budget), *((("window", window),) if window is not None else ()), *fields.items())


def _scored(budget: float, **fields: Any) -> dict[str, Any]:
    return {"importance": "scores", "policy": _policy(budget, window=None, scorer="given", **fields)}


_HEADS: dict[str, Any] = {"budget_allocation": "adaptive_heads"}
_CAKE: dict[str, Any] = {"budget_allocation": "cake"}
_CORNERS: tuple[Spec, ...] = (
    Spec(name="layer-default", tokens=65, kv_heads=3, policy=_policy(20, granularity="layer")),
    Spec(name="layer-one-head", tokens=65, kv_heads=1, policy=_policy(20, granularity="layer"), graph=_ONE_SHOT),
    Spec(name="layer-one-token", tokens=1, policy=_policy(1, granularity="layer")),
    Spec(name="layer-window-fills-budget", policy=_policy(8, window=8, granularity="layer")),
    Spec(name="layer-narrow", tokens=65, kv_heads=3, policy=_policy(9, granularity="layer"), graph=(("candidates", 1),)),
    Spec(name="layer-ties", kv_heads=3, scores="ties", **_scored(9, granularity="layer")),
    Spec(name="layer-ties-max", kv_heads=3, scores="ties", **_scored(9, granularity="layer", combine="max")),
    Spec(name="layer-ties-vote", kv_heads=3, scores="ties", graph=_SEQUENTIAL, **_scored(9, granularity="layer")),
    Spec(name="layer-zeros-vote", kv_heads=3, scores="zeros", keys="duplicated", graph=_SEQUENTIAL, **_scored(9, granularity="layer")),
    Spec(name="layer-negative", kv_heads=3, scores="negative", **_scored(9, granularity="layer")),
    Spec(name="layer-negative-base", kv_heads=3, scores="negative", graph=None, **_scored(9, granularity="layer")),
    Spec(name="layer-negative-base-max", tokens=11, kv_heads=3, scores="negative", graph=None, **_scored(5, granularity="layer", combine="max")),
    Spec(name="layer-negative-narrow", kv_heads=3, scores="negative", graph=(("candidates", 1),), **_scored(9, granularity="layer")),
    Spec(name="layer-padded", kv_heads=3, scores="padded", **_scored(9, granularity="layer")),
    Spec(name="layer-padded-vote", kv_heads=3, scores="padded", graph=_SEQUENTIAL, **_scored(9, granularity="layer")),
    Spec(name="layer-sparse-vote", kv_heads=3, scores="sparse", graph=_SEQUENTIAL, **_scored(9, granularity="layer")),
    Spec(name="layer-pinned", pinned=((3, 6), (20, 23)), policy=_policy(9, granularity="layer", sinks=2)),
    Spec(name="layer-pyramid", layers=5, tokens=79, policy=_policy(16, granularity="layer", budget_allocation="pyramid")),
    Spec(name="model-default", layers=5, tokens=65, policy=_policy(20, granularity="model")),
    Spec(name="model-sequential", layers=5, tokens=65, rope="full", dtype="bf16", policy=_policy(20, granularity="model", sinks=4), graph=_DEFAULT),
    Spec(name="model-one-layer", tokens=65, policy=_policy(20, granularity="model", combine="max")),
    Spec(name="model-many-layers", layers=13, tokens=31, kv_heads=3, policy=_policy(9, granularity="model"), graph=_ONE_SHOT),
    Spec(name="model-ragged", layers=3, kv_heads=3, scores="padded", graph=_ONE_SHOT, **_scored(9, granularity="model")),
    Spec(name="model-sparse-vote", layers=3, kv_heads=3, scores="sparse", graph=_SEQUENTIAL, **_scored(9, granularity="model")),
    Spec(name="model-tova", layers=2, kv_heads=3, policy=_policy(9, window=1, scorer="tova", granularity="model")),
    Spec(name="pages-default", tokens=79, policy=_policy(24, page_size=4), rope="full", graph=_DEFAULT),
    Spec(name="pages-of-1", tokens=47, policy=_policy(16, page_size=1)),
    Spec(name="pages-of-n", tokens=47, policy=_policy(16, page_size=47)),
    Spec(name="pages-above-n", tokens=47, policy=_policy(16, page_size=64)),
    Spec(name="pages-above-B", tokens=79, policy=_policy(7, window=1, page_size=16)),
    Spec(name="pages-all-even", tokens=64, policy=_policy(32, page_size=8), graph=_ONE_SHOT),
    Spec(name="pages-pinned-over-several", tokens=79, pinned=((1, 2), (26, 31), (52, 53)), policy=_policy(40, window=3, page_size=5, sinks=1)),
    Spec(name="pages-overflow", tokens=79, pinned=((40, 41),), policy=_policy(9, window=6, page_size=3, sinks=6)),
    Spec(name="pages-only-partial", tokens=33, **_scored(5, page_size=4)),
    Spec(name="pages-padded", tokens=33, scores="padded", **_scored(12, page_size=3)),
    Spec(name="pages-sparse", tokens=33, kv_heads=3, scores="sparse", **_scored(12, page_size=3)),
    Spec(name="pages-sparse-vote", tokens=33, kv_heads=3, scores="sparse", graph=_SEQUENTIAL, **_scored(12, page_size=3)),
    Spec(name="pages-ties", tokens=33, scores="ties", graph=None, **_scored(12, page_size=2)),
    Spec(name="pages-ties-max", tokens=33, scores="ties", **_scored(12, page_size=2, combine="max")),
    Spec(name="pages-ties-vote", tokens=33, scores="ties", graph=_SEQUENTIAL, **_scored(12, page_size=2)),
    Spec(name="pages-evict", tokens=61, policy=_policy(20, page_size=3), graph=(("signal", "evict"), ("threshold", 0.5), ("source_ratio", 0.6))),
    Spec(name="pages-layer-vote", tokens=61, kv_heads=3, policy=_policy(20, page_size=3, granularity="layer"), graph=_SEQUENTIAL),
    Spec(name="pages-model", tokens=61, layers=3, policy=_policy(20, page_size=7, granularity="model", combine="max"), graph=_ONE_SHOT),
    Spec(name="pages-model-vote", tokens=61, layers=3, policy=_policy(20, page_size=7, granularity="model"), graph=_SEQUENTIAL),
    Spec(name="adaptive-default", tokens=79, kv_heads=3, policy=_policy(20, **_HEADS)),
    Spec(name="adaptive-alpha-0", tokens=79, kv_heads=3, policy=_policy(20, **_HEADS, options=(("alpha", 0.0),)), graph=_ONE_SHOT),
    Spec(name="adaptive-alpha-1", tokens=79, kv_heads=3, policy=_policy(20, **_HEADS, options=(("alpha", 1.0),)), graph=_ONE_SHOT),
    Spec(name="adaptive-base", tokens=79, kv_heads=3, policy=_policy(20, **_HEADS), graph=None),
    Spec(name="adaptive-base-knorm", tokens=61, kv_heads=3, keys="random", importance="none", graph=None,
         policy=_policy(20, window=2, scorer="knorm", **_HEADS, options=(("alpha", 0.0),))),
    Spec(name="layer-base-knorm-max", tokens=61, kv_heads=3, keys="random", importance="none", graph=None,
         policy=_policy(20, window=2, scorer="knorm", granularity="layer", combine="max")),
    Spec(name="adaptive-one-head", tokens=61, kv_heads=1, policy=_policy(20, **_HEADS)),
    Spec(name="adaptive-sequential", tokens=79, kv_heads=3, rope="full", policy=_policy(20, **_HEADS, sinks=4), graph=_DEFAULT),
    Spec(name="adaptive-sequential-duplicates", tokens=61, kv_heads=3, keys="duplicated", policy=_policy(20, **_HEADS), graph=(("update", "sequential"),)),
    Spec(name="adaptive-ties", tokens=61, kv_heads=3, scores="ties", graph=None, **_scored(20, **_HEADS)),
    Spec(name="adaptive-ties-sequential", tokens=61, kv_heads=3, scores="ties", graph=_SEQUENTIAL, **_scored(20, **_HEADS)),
    Spec(name="adaptive-zeros", tokens=61, kv_heads=3, scores="zeros", graph=_SEQUENTIAL, **_scored(20, **_HEADS)),
    Spec(name="adaptive-padded", tokens=61, kv_heads=3, scores="sparse", **_scored(20, **_HEADS)),
    Spec(name="adaptive-narrow", tokens=61, kv_heads=3, policy=_policy(20, **_HEADS, options=(("alpha", 0.0),)), graph=(("candidates", 1),)),
    Spec(name="adaptive-evict", tokens=61, kv_heads=3, policy=_policy(20, **_HEADS), graph=(*_ONE_SHOT, ("signal", "evict"))),
    Spec(name="adaptive-tova", tokens=61, kv_heads=3, policy=_policy(20, window=1, scorer="tova", **_HEADS), graph=None),
    Spec(name="adaptive-window-fills-budget", kv_heads=3, policy=_policy(8, window=8, **_HEADS)),
    Spec(name="cake-default", layers=5, tokens=79, policy=_policy(20, **_CAKE, scorer="cake")),
    Spec(name="cake-window-1", layers=3, tokens=61, policy=_policy(20, window=1, **_CAKE)),
    Spec(name="cake-one-layer", tokens=61, policy=_policy(20, **_CAKE)),
    Spec(name="cake-capped", layers=5, tokens=29, importance="attention", policy=_policy(20, **_CAKE, options=(("tau1", 0.2), ("tau2", 0.2)))),
    Spec(name="cake-aligned", layers=3, tokens=79, policy=_policy(20, **_CAKE, page_align=8)),
    Spec(name="cake-knorm", layers=3, tokens=61, policy=_policy(20, **_CAKE, scorer="knorm")),
    Spec(name="cake-h2o", layers=3, tokens=61, policy=_policy(20, **_CAKE, scorer="h2o")),
    Spec(name="cake-tova-layer", layers=3, tokens=61, policy=_policy(20, **_CAKE, scorer="tova", granularity="layer"), graph=_SEQUENTIAL),
    Spec(name="cake-pages", layers=3, tokens=61, policy=_policy(20, **_CAKE, page_size=4), graph=_SEQUENTIAL),
)  # fmt: skip
_EXPECTED: dict[str, Any] = {"importance": "expected", "tokens": 61}
_EXPECTATIONS: tuple[Spec, ...] = (
    Spec(name="expected", policy=(("budget", 16), ("scorer", "expected_attention")), **_EXPECTED),
    Spec(name="expected-f16", dtype="f16", group=3, policy=(("budget", 16), ("scorer", "expected_attention")), graph=_SEQUENTIAL, **_EXPECTED),
    Spec(name="expected-layer", kv_heads=3, policy=(("budget", 16), ("scorer", "expected_attention"), ("granularity", "layer")), **_EXPECTED),
    Spec(name="expected-adaptive", kv_heads=3, graph=None, **_EXPECTED,
         policy=(("budget", 16), ("scorer", "expected_attention"), ("budget_allocation", "adaptive_heads"))),
)  # fmt: skip


def coarse_corners() -> tuple[Spec, ...]:
    """All but those of `expected`, with distinct seeds."""
    return tuple(dataclasses.replace(spec, seed=3000 + place) for place, spec in enumerate(_CORNERS))


def expected() -> tuple[Spec, ...]:
    """Of the scorer expected_attention."""
    return tuple(dataclasses.replace(spec, seed=4000 + place) for place, spec in enumerate(_EXPECTATIONS))
