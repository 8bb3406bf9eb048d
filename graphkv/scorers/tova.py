"""TOVA (arXiv:2401.06104): a token matters as much as the last one attends to it, all heads of a layer together.

Knows one layer's keys and its last query; whatever earlier queries come are not read.
"""

import dataclasses

import torch

from graphkv.attention import attention_blocks
from graphkv.kernels import Kernels
from graphkv.layer import Layer

__all__ = ["score"]


def score(layer: Layer, kernels: Kernels) -> torch.Tensor:
    """float32 [Hkv, n]: the last query's attention, averaged over all query heads; the same for every KV head."""
    total = torch.zeros(layer.plan.num_tokens, dtype=torch.float64, device=layer.keys.device)
    for _, _, attention in attention_blocks(_last_row(layer)):
        total += attention[:, -1].sum(dim=0, dtype=torch.float64)
    mean = (total / (layer.kv_heads * layer.group)).to(torch.float32)
    return mean.expand(layer.kv_heads, -1)


def _last_row(layer: Layer) -> Layer:
    queries = None if layer.queries is None else layer.queries[:, -1:]
    attention = None if layer.attention is None else layer.attention[:, -1:]
    return dataclasses.replace(layer, queries=queries, attention=attention)
