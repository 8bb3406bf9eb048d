"""The initial importance, float64: what the scorers of docs/algorithm.md give, by loops that follow the text.

Part of the reference; knows nothing of the library, of budgets or of the graph.
"""

import math
from dataclasses import dataclass

import numpy as np

from graphkv.terms.policy import Policy

__all__ = ["Importance", "attention_of_window", "layer_attention", "layer_importance", "pooled", "snapkv"]

_POOL_WIDTHS = {"snapkv": 7, "cake": 5}


@dataclass(frozen=True)
class Importance:
    """Scores of one layer and where they come from.

    values: float64 [Hkv, n]; 0 at the observation window's tokens where the scorer gives them none.
    scorer: the one that ran, or "scores" (the caller's, exact). source: "queries", "attention", "keys" or "scores".
    rows, pool_width, group, logits: what the error of arithmetic depends on; logits is the largest sum |q_i k_i| / sqrt(d).
    terms: [Hkv, n], of which `values` are off by a small share: their absolute value, or more where differences are taken.
    equal: which values come from the same numbers in the same order, so that any arithmetic finds them equal: "all" equal
    ones, "row" those of one row, "token" a token's in all rows of the layer; "" none.
    """

    values: np.ndarray
    scorer: str
    source: str
    rows: int = 0
    pool_width: int = 1
    group: int = 1
    logits: float = 0.0
    terms: np.ndarray | None = None
    equal: str = ""


def layer_importance(
    policy: Policy,
    keys: np.ndarray,
    *,
    window: int,
    received: np.ndarray | None = None,
    queries: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    query_mean: np.ndarray | None = None,
    query_covariance: np.ndarray | None = None,
    values: np.ndarray | None = None,
) -> Importance:
    """keys [Hkv, n, d], received: attention [Hq, rows, n], from `queries` [Hq, rows, d] where these were given, scores
    [Hkv, n], values [Hkv, n, x]; `window` is min(w, n)."""
    kv_heads, scorer = keys.shape[0], policy.scorer
    if scores is not None:
        return Importance(np.array(scores, dtype=np.float64), "scores", "scores", rows=window, equal="all")
    if scorer == "knorm":
        return Importance(-np.sqrt((keys * keys).sum(axis=-1)), scorer, "keys")
    if scorer == "keydiff":
        own, terms = _keydiff(keys)
        return Importance(own, scorer, "keys", terms=terms)
    if scorer == "expected_attention":
        return _expected_attention(keys, query_mean, query_covariance, values)
    if received is None:
        raise ValueError(f"{scorer} needs scores")
    rows, group = received.shape[1], received.shape[0] // kv_heads
    logits, source = 0.0, "attention"
    if queries is not None:
        logits, source = _largest_logit(queries, keys), "queries"
    origin = {"rows": rows, "group": group, "logits": logits}
    if scorer == "tova":
        last = received[:, -1].mean(axis=0)
        return Importance(np.tile(last, (kv_heads, 1)), scorer, source, **{**origin, "group": len(received)}, equal="token")
    if scorer == "h2o":
        if rows != keys.shape[1]:
            raise ValueError(f"{rows} query rows for {keys.shape[1]} tokens")
        total = received.sum(axis=1)
        heads = [total[head * group : (head + 1) * group].mean(axis=0) for head in range(kv_heads)]
        return Importance(np.array(heads), scorer, source, **origin)
    width = _POOL_WIDTHS[scorer] if policy.pool_width is None else policy.pool_width
    last = received[:, rows - window :]
    same = "row" if policy.pooling == "max" and width > 1 else ""
    origin |= {"rows": window, "pool_width": width, "equal": same}
    if scorer == "snapkv":
        return Importance(snapkv(last, kv_heads, width, policy.pooling), scorer, source, **origin)
    gamma = dict(policy.options).get("gamma", 200.0)
    own, terms = _cake(last, kv_heads, width, policy.pooling, gamma)
    return Importance(own, scorer, source, **origin, terms=terms)


def layer_attention(keys: np.ndarray, queries: np.ndarray | None, attention: np.ndarray | None) -> np.ndarray | None:
    """[Hq, rows, n], as given or of the queries."""
    return attention if queries is None else attention_of_window(queries, keys)


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


def _largest_logit(queries: np.ndarray, keys: np.ndarray) -> float:
    group = queries.shape[0] // keys.shape[0]
    largest = [float((np.abs(queries[h]) @ np.abs(keys[h // group]).T).max()) for h in range(len(queries))]
    return max(largest) / math.sqrt(keys.shape[-1])


def snapkv(attention: np.ndarray, kv_heads: int, width: int, pooling: str) -> np.ndarray:
    """Mean over the window's queries, pooling over the n - w tokens before it, mean over the group: [Hkv, n]."""
    return _smoothed(attention.mean(axis=1), attention.shape[1], kv_heads, width, pooling)


def _cake(attention: np.ndarray, kv_heads: int, width: int, pooling: str, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean + gamma * sample variance over the window, then as for snapkv; and what its error is in proportion to."""
    window = attention.shape[1]
    mean = attention.mean(axis=1)
    away = np.abs(attention - mean[:, None])
    variance, spread = np.zeros_like(mean), np.zeros_like(mean)
    if window > 1:
        variance = (away**2).sum(axis=1) / (window - 1)
        spread = (2 * away * (attention + mean[:, None]) + away**2).sum(axis=1) / (window - 1)
    own = _smoothed(mean + gamma * variance, window, kv_heads, width, pooling)
    return own, _smoothed(mean + gamma * spread, window, kv_heads, width, pooling)


def _smoothed(heads: np.ndarray, window: int, kv_heads: int, width: int, pooling: str) -> np.ndarray:
    """Pooling over the tokens before the window, then the mean over the group: [Hq, n] to [Hkv, n]."""
    before, group = heads.shape[1] - window, len(heads) // kv_heads
    values = np.zeros((kv_heads, heads.shape[1]))
    for head in range(kv_heads):
        own = [pooled(heads[h, :before], width, pooling) for h in range(head * group, (head + 1) * group)]
        values[head, :before] = np.mean(own, axis=0)
    return values


def pooled(values: np.ndarray, width: int, pooling: str) -> np.ndarray:
    """1-d pooling, stride 1, 'same': avg pads with zeros and divides by the width always, max pads with -inf."""
    half, size = width // 2, len(values)
    out = np.empty(size)
    for j in range(size):
        inside = values[max(0, j - half) : min(size, j + half + 1)]
        out[j] = inside.max() if pooling == "max" else inside.sum() / width
    return out


def _keydiff(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-cos(k, mean of the unit keys) [Hkv, n], and what its error is in proportion to."""
    scores, terms = np.zeros(keys.shape[:2]), np.zeros(keys.shape[:2])
    for head, own in enumerate(keys):
        norms = np.sqrt((own * own).sum(axis=-1))
        units = own / np.where(norms > 0, norms, 1.0)[:, None]
        mean = units.mean(axis=0)
        length = math.sqrt(float((mean * mean).sum()))
        if length > 0:
            scores[head] = -(units @ mean) / length
            away = np.abs(units).mean(axis=0) / length  # the mean is off in proportion to it
            terms[head] = np.abs(units) @ (np.abs(mean) / length + away) + np.abs(scores[head]) * (away.sum() + 1.0)
    return scores, terms


def _expected_attention(
    keys: np.ndarray, mean: np.ndarray | None, covariance: np.ndarray | None, values: np.ndarray | None
) -> Importance:
    """softmax(k mu / sqrt(d) + k^T Sigma k / 2d), mean over the group, times norm2(v)."""
    if mean is None or covariance is None or values is None:
        raise ValueError("expected_attention needs query_mean, query_covariance and values")
    kv_heads, num_tokens, dim = keys.shape
    group, logits = len(mean) // kv_heads, 0.0
    expected = np.zeros((kv_heads, num_tokens))
    for h in range(len(mean)):
        own = keys[h // group]
        logit = own @ mean[h] / math.sqrt(dim) + np.einsum("ta,ab,tb->t", own, covariance[h], own) / (2 * dim)
        size = np.abs(own) @ np.abs(mean[h]) / math.sqrt(dim)
        size = size + 2 * np.einsum("ta,ab,tb->t", np.abs(own), np.abs(covariance[h]), np.abs(own)) / (2 * dim)
        logits = max(logits, float(size.max()))
        weights = np.exp(logit - logit.max())
        expected[h // group] += weights / weights.sum() / group
    own = expected * np.sqrt((values * values).sum(axis=-1))
    return Importance(own, "expected_attention", "queries", rows=1, group=group + values.shape[-1], logits=logits)
