"""Attention of the last queries of a prompt, a few heads and rows at a time, so that memory follows neither."""

import math
from collections.abc import Iterator

import torch

from graphkv.kernels.allowance import allowance
from graphkv.kernels.products import padded, products

__all__ = ["blocks_of"]

_LOGITS = 8 * 2**20  # bytes held at once
_TILE = 512


def blocks_of(queries: torch.Tensor, keys: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """softmax(q k^T / sqrt(d)), causal, of the last w queries: queries [Hq, w, d], keys [Hkv, n, d].

    Logits and softmax in float32. The blocks' sizes depend on the shapes alone, and so do the results.
    """
    heads, window, dim = queries.shape
    kv_heads, tokens = keys.shape[:2]
    group = heads // kv_heads
    width = padded(tokens, _TILE)  # a fixed width: the softmax of a row must not depend on its alignment
    limit = allowance(keys.device, _LOGITS)
    rows_at_once = max(1, min(window, limit // (4 * width)))
    heads_at_once = max(1, min(group, limit // (4 * rows_at_once * width)))
    for kv_head in range(kv_heads):
        for first in range(kv_head * group, (kv_head + 1) * group, heads_at_once):
            own = queries[first : min(first + heads_at_once, (kv_head + 1) * group)]
            for row in range(0, window, rows_at_once):
                asked = own[:, row : row + rows_at_once]
                scaled = (asked.to(torch.float64) / math.sqrt(dim)).to(torch.float32).flatten(0, 1)
                seen = tokens - window + row + 1  # the tokens that the block's first row sees
                logits = products(scaled, keys[kv_head], columns=width).view(own.shape[0], -1, width)
                unseen = torch.ones(logits.shape[1], width - seen, dtype=torch.bool, device=keys.device).triu()
                logits[..., seen:].masked_fill_(unseen, -math.inf)
                attention = torch.softmax(logits, dim=-1)
                del logits  # half of what is held
                yield first, row, attention[..., :tokens]
