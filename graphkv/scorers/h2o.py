"""H2O (arXiv:2306.14048): a token matters as much as all later ones attended to it.

Knows one layer's keys and all its queries; a running sum kept while generating goes in as `scores=` instead.
"""

import torch

from graphkv.attention import attention_blocks
from graphkv.kernels import Kernels
from graphkv.layer import Layer

__all__ = ["score"]


def score(layer: Layer, kernels: Kernels) -> torch.Tensor:
    """float32 [Hkv, n]: the attention received, summed over all queries, averaged over a KV head's query heads."""
    heads = layer.kv_heads * layer.group
    received = torch.zeros(heads, layer.plan.num_tokens, dtype=torch.float64, device=layer.keys.device)
    for first, _, attention in attention_blocks(layer):
        for offset, head in enumerate(attention):
            received[first + offset] += head.sum(dim=0, dtype=torch.float64)
    return received.view(layer.kv_heads, layer.group, -1).mean(dim=1).to(torch.float32)
