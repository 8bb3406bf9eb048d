"""CAKE (arXiv:2503.12491): what the end of the prompt attends to, and where its attention wavers.

Knows one layer's keys and window queries; its budget allocation is in `graphkv.budgets`.
"""

import torch

from graphkv.attention import attention_blocks
from graphkv.kernels import Kernels
from graphkv.layer import Layer
from graphkv.scorers.snapkv import pool

__all__ = ["score"]


def score(layer: Layer, kernels: Kernels) -> torch.Tensor:
    """float32 [Hkv, n - w]: mean + gamma x sample variance over the window's rows, pooled, averaged over the group."""
    policy, window = layer.plan.policy, layer.plan.window
    before = layer.plan.num_tokens - window
    heads = layer.kv_heads * layer.group
    total, squares = torch.zeros(2, heads, before, dtype=torch.float64, device=layer.keys.device)
    for first, _, attention in attention_blocks(layer):
        for offset, head in enumerate(attention):
            own = head[:, :before].to(torch.float64)
            total[first + offset] += own.sum(dim=0)
            squares[first + offset] += own.square().sum(dim=0)
    mean = total / window
    variance = (squares - total * mean).clamp_(min=0.0) / max(1, window - 1)
    pooled = pool(mean + policy.option("gamma") * variance, policy)
    return pooled.view(layer.kv_heads, layer.group, -1).mean(dim=1).to(torch.float32)
