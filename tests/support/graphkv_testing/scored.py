"""The reference's answers to small prompts with scores written out, for tests whose numbers are worked out by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphkv.terms.policy import Graph, Policy
from graphkv_testing.reference import select_prompt

__all__ = ["scored"]


def scored(
    scores: Any,
    *,
    keys: Any = None,
    budget: int = 2,
    graph: Graph | None = None,
    pinned: Sequence[tuple[int, int]] = (),
    **fields: Any,
) -> list[Any]:
    """The answers under scores [n], [Hkv, n] or [L, Hkv, n]; keys [n, d] the same everywhere (default: all orthogonal)."""
    scores = np.array(scores, dtype=np.float64)
    scores = scores.reshape((1,) * (3 - scores.ndim) + scores.shape)
    keys = np.eye(scores.shape[2]) if keys is None else np.array(keys, dtype=np.float64)
    everywhere = np.broadcast_to(keys, (*scores.shape[:2], *keys.shape))
    policy = Policy(budget, scorer="given", graph=graph, **fields)
    return select_prompt(everywhere, scores=scores, policy=policy, pinned=pinned)
