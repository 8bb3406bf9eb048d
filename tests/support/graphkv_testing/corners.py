"""Cases written by hand: the rows of docs/algorithm.md's edge cases, the named settings, and a few prompts that are large.

The large ones cross the tiles that an implementation works in; the rest take milliseconds.
"""

import dataclasses
from typing import Any

from graphkv_testing.spec import Spec

__all__ = ["corners", "large"]

_SCORED: dict[str, Any] = {"importance": "scores", "policy": (("budget", 7), ("scorer", "given"))}
_ONE_SHOT = (("neighbors", "auto"), ("threshold", 0.0), ("candidates", None))
_SEQUENTIAL = (("update", "sequential"), ("strength", 0.5), ("candidates", 2))
_CORNERS: tuple[Spec, ...] = (
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
    Spec(name="additive-many-sources", keys="random", importance="scores", policy=(("budget", 24), ("scorer", "given")),
         graph=(("neighbors", 100), *_ONE_SHOT[1:], ("update", "additive"), ("strength", 0.5))),
    Spec(name="additive-enhance", importance="scores", policy=(("budget", 24), ("scorer", "given")),
         graph=(("neighbors", 100), *_ONE_SHOT[1:], ("update", "additive"), ("signal", "enhance"))),
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
_LARGE: tuple[Spec, ...] = (
    Spec(name="large-paper", tokens=1201, kv_heads=1, group=3, head_dim=16, policy=(("budget", 150), ("window", 16)), graph=_ONE_SHOT),
    Spec(name="large-default", tokens=1201, kv_heads=1, head_dim=16, dtype="bf16", policy=(("budget", 150), ("window", 16))),
    Spec(name="large-sequential", tokens=701, kv_heads=1, head_dim=16, rope="full", policy=(("budget", 150), ("sinks", 4)),
         graph=(("update", "sequential"), ("similarity", "pre_rope"), ("strength", 0.1), ("candidates", 2))),
    Spec(name="large-sequential-all", tokens=701, kv_heads=1, keys="duplicated", policy=(("budget", 90), ("window", 16)),
         graph=(("update", "sequential"), ("strength", 0.5), ("candidates", None))),
    Spec(name="large-knorm", tokens=2050, kv_heads=1, importance="none", policy=(("budget", 40), ("scorer", "knorm")), graph=_ONE_SHOT),
)  # fmt: skip


def corners() -> tuple[Spec, ...]:
    """The small ones, with distinct seeds."""
    return tuple(dataclasses.replace(spec, seed=1000 + place) for place, spec in enumerate(_CORNERS))


def large() -> tuple[Spec, ...]:
    """Prompts of 701 to 2,050 tokens."""
    return tuple(dataclasses.replace(spec, seed=2000 + place) for place, spec in enumerate(_LARGE))
