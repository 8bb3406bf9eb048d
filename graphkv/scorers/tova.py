"""TOVA (arXiv:2401.06104): a token matters as much as the last one attends to it, all heads of a layer together.

Knows one layer's keys and its last query; whatever earlier queries come are not read.
"""

import torch

from graphkv.attention import attention_blocks
from graphkv.kernels import Kernels
from graphkv.layer import Layer

__all__ = ["score"]


def score(layer: Layer, kernels: Kernels) -> torch.Tensor:
    """float32 [Hkv, n]: the last query's attention, averaged over all query heads; the same for every KV head."""
    total = torch.zeros(layer.plan.num_tokens, dtype=torch.float64, device=layer.keys.device)
    for _, _, attention in attention_blocks(layer, last=1):
        total += attention[:, -1].sum(dim=0, dtype=torch.float64)
    mean = (total / (layer.kv_heads * layer.group)).to(torch.float32)
    return mean.expand(layer.kv_heads, -1)
