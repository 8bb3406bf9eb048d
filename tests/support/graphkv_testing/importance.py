"""The initial importance, float64: what the scorers of docs/algorithm.md give, by loops that follow the text.

Part of the reference; knows nothing of the library, of budgets or of the graph.
"""

import math
from dataclasses import dataclass

import numpy as np

from graphkv.terms.policy import Policy

__all__ = ["Importance", "attention_of_window", "layer_importance", "pooled", "snapkv"]


@dataclass(frozen=True)
class Importance:
    """Scores of one layer and where they come from.

    values: float64 [Hkv, n]; 0 at the observation window's tokens where the scorer gives them none.
    source: "queries", "attention", "keys" (knorm) or "scores" (the caller's, exact).
    window, pool_width, group, logits: what the error of arithmetic depends on; logits is the largest sum |q_i k_i| / sqrt(d).
    equal_means_equal: equal values here come from the same numbers, so any arithmetic finds them equal (ties are exact).
    """

    values: np.ndarray
    source: str
    window: int = 0
    pool_width: int = 1
    group: int = 1
    logits: float = 0.0
    equal_means_equal: bool = False


def layer_importance(
    policy: Policy,
    keys: np.ndarray,
    *,
    window: int,
    queries: np.ndarray | None = None,
    attention: np.ndarray | None = None,
    scores: np.ndarray | None = None,
) -> Importance:
    """keys [Hkv, n, d], queries [Hq, w, d], attention [Hq, w, n], scores [Hkv, n]; `window` is min(w, n)."""
    kv_heads = keys.shape[0]
    if scores is not None:
        return Importance(np.array(scores, dtype=np.float64), "scores", window=window, equal_means_equal=True)
    if policy.scorer == "knorm":
        return Importance(-np.sqrt((keys * keys).sum(axis=-1)), "keys", window=window)
    if policy.scorer != "snapkv":
        raise ValueError(f"{policy.scorer} needs scores")
    width = 7 if policy.pool_width is None else policy.pool_width
    logits = 0.0
    if queries is not None:
        group = queries.shape[0] // kv_heads
        logits = max(
            float((np.abs(queries[h]) @ np.abs(keys[h // group]).T).max()) / math.sqrt(keys.shape[-1])
            for h in range(len(queries))
        )
        received, source = attention_of_window(queries, keys), "queries"
    else:
        received, source = attention, "attention"
    if received.shape[1] != window:
        raise ValueError(f"{received.shape[1]} query rows where the window is {window}")
    values = snapkv(received, kv_heads, width, policy.pooling)
    same = policy.pooling == "max" and width > 1
    return Importance(values, source, window, width, received.shape[0] // kv_heads, logits, same)


def attention_of_window(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) of the last w queries [Hq, w, d] on keys [Hkv, n, d]: [Hq, w, n], causal in the window."""
    query_heads, window, head_dim = queries.shape
    kv_heads, num_tokens, _ = keys.shape
    received = np.zeros((query_heads, window, num_tokens))
    for h in range(query_heads):
        key = keys[h // (query_heads // kv_heads)]
        for row in range(window):
            seen = num_tokens - window + row + 1  # the query's own token is the last it sees
            logits = key[:seen] @ queries[h, row] / math.sqrt(head_dim)
            weights = np.exp(logits - logits.max())
            received[h, row, :seen] = weights / weights.sum()
    return received


def snapkv(attention: np.ndarray, kv_heads: int, width: int, pooling: str) -> np.ndarray:
    """Mean over the window's queries, pooling over the n - w tokens before it, mean over the group: [Hkv, n]."""
    query_heads, window, num_tokens = attention.shape
    before = num_tokens - window
    group = query_heads // kv_heads
    values = np.zeros((kv_heads, num_tokens))
    for head in range(kv_heads):
        heads = [pooled(attention[h, :, :before].mean(axis=0), width, pooling) for h in range(head * group, (head + 1) * group)]
        values[head, :before] = np.mean(heads, axis=0)
    return values


def pooled(values: np.ndarray, width: int, pooling: str) -> np.ndarray:
    """1-d pooling, stride 1, 'same': avg pads with zeros and divides by the width always, max pads with -inf."""
    half, size = width // 2, len(values)
    out = np.empty(size)
    for j in range(size):
        inside = values[max(0, j - half) : min(size, j + half + 1)]
        out[j] = inside.max() if pooling == "max" else inside.sum() / width
    return out
