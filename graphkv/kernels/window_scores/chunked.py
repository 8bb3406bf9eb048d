"""Attention received from the observation window, with at most a few query heads' logits in memory at a time."""

import math

import torch

from graphkv.kernels.products import padded, products

__all__ = ["window_scores"]

_LIMIT = 8 * 2**20  # bytes of logits held at once, so that memory does not follow the number of query heads
_TILE = 512


def window_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """float64 [Hq, n - w]; see `naive`. Logits and softmax in float32, the mean over the window in float64."""
    heads, window, dim = queries.shape
    kv_heads, tokens = keys.shape[:2]
    group = heads // kv_heads
    before = tokens - window
    received = torch.empty(heads, before, dtype=torch.float64, device=keys.device)
    width = padded(tokens, _TILE)  # a fixed width: the softmax of a row must not depend on its alignment
    at_once = max(1, min(group, _LIMIT // (4 * window * width)))
    unseen = torch.ones(window, width - before, dtype=torch.bool, device=keys.device).triu(1)
    starts = [head for kv_head in range(kv_heads) for head in range(kv_head * group, (kv_head + 1) * group, at_once)]
    for first in starts:
        kv_head = first // group
        own = queries[first : min(first + at_once, (kv_head + 1) * group)]
        rows = (own.to(torch.float64) / math.sqrt(dim)).to(torch.float32).flatten(0, 1)
        logits = products(rows, keys[kv_head], columns=width).view(-1, window, width)
        logits[..., before:].masked_fill_(unseen, -math.inf)
        attention = torch.softmax(logits, dim=-1)
        del logits  # half of what is held
        for offset, head in enumerate(attention):
            received[first + offset] = head[:, :before].mean(dim=0, dtype=torch.float64)
    return received
