"""Attention received from the observation window, with at most a few query heads' logits in memory at a time."""

import math

import torch

from graphkv.kernels.products import padded, products

__all__ = ["window_scores"]

_LIMIT = 16 * 2**20  # bytes of logits held at once, so that memory does not follow the number of query heads
_TILE = 512


def window_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """float64 [Hq, n - w]; see `naive`. Logits and softmax in float32, the mean over the window in float64."""
    heads, window, dim = queries.shape
    kv_heads, tokens = keys.shape[:2]
    group = heads // kv_heads
    received = torch.empty(heads, tokens - window, dtype=torch.float64, device=keys.device)
    width = padded(tokens, _TILE)  # a fixed width: the softmax of a row must not depend on its alignment
    at_once = max(1, min(group, _LIMIT // (4 * window * width)))
    unseen = torch.ones(window, width, dtype=torch.bool, device=keys.device).triu(tokens - window + 1)
    for kv_head in range(kv_heads):
        for first in range(kv_head * group, (kv_head + 1) * group, at_once):
            own = queries[first : min(first + at_once, (kv_head + 1) * group)]
            rows = (own.to(torch.float64) / math.sqrt(dim)).to(torch.float32).flatten(0, 1)
            logits = torch.zeros(rows.shape[0], width, dtype=torch.float32, device=keys.device)
            logits[:, :tokens] = products(rows, keys[kv_head])
            logits = logits.view(-1, window, width).masked_fill_(unseen, -math.inf)
            attention = torch.softmax(logits, dim=-1)
            for offset in range(own.shape[0]):
                before = attention[offset, :, : tokens - window]
                received[first + offset] = before.mean(dim=0, dtype=torch.float64)
    return received
