"""adaptive_heads: the heads of a layer share its budget, after the graph. Part of the reference."""

import math
from collections.abc import Sequence

import numpy as np

from graphkv.terms.policy import Policy
from graphkv_testing.graph_steps import best_first
from graphkv_testing.states import LayerState, RowState

__all__ = ["safe_count", "share_heads", "shared_by_heads", "worth"]


def share_heads(state: LayerState) -> None:
    """Replaces what every row keeps, and the layer's figures."""
    if state.keeps_all:
        return
    rows = state.rows
    kept = shared_by_heads(rows, [row.candidates for row in rows], [worth(row) for row in rows], state.policy)
    base = shared_by_heads(rows, [row.contenders for row in rows], [row.base for row in rows], state.policy)
    mass = total = 0.0
    state.changed = 0
    for row, own, without in zip(rows, kept, base, strict=True):
        row.kept, row.base_kept = sorted([*row.always, *own]), without
        state.changed += len(set(own) - set(without))
        mass += sum(float(row.shifted[j]) for j in own)
        total += sum(float(row.shifted[j]) for j in row.contenders)
    state.kept_score_ratio = mass / total if total > 0 else 1.0


def worth(row: RowState) -> np.ndarray:
    """[n]: what a candidate is worth beside those of other heads. Sequential scores compare by x."""
    if row.graph is None or not row.graph.x:
        return row.values
    values = np.full(row.num_tokens, np.nan)
    for j, x in row.graph.x.items():
        values[j] = x
    return values


def safe_count(policy: Policy, budget: int, always: int) -> int:
    """How many of its best a head keeps in any case, always-kept tokens apart."""
    alpha = dict(policy.options).get("alpha", 0.2)
    return max(0, math.floor(alpha * budget + 1e-9) - always)


def shared_by_heads(
    rows: Sequence[RowState], candidates: Sequence[Sequence[int]], values: Sequence[np.ndarray], policy: Policy
) -> list[list[int]]:
    """What each row keeps besides the always-kept tokens."""
    safe = safe_count(policy, rows[0].budget, len(rows[0].always))
    ranked = [best_first(own, value) for own, value in zip(candidates, values, strict=True)]
    kept = [own[:safe] for own in ranked]
    rest = len(rows) * rows[0].contended - sum(len(own) for own in kept)
    others = [(-values[head][j], head, j) for head, own in enumerate(ranked) for j in own[safe:]]
    for _, head, j in sorted(others)[:rest]:
        kept[head].append(j)
    return kept
