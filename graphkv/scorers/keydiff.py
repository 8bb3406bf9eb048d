"""KeyDiff (arXiv:2504.15364): a token matters the more, the less its key looks like the average one.

Knows one layer's keys; nothing of budgets, the graph or the wire.
"""

import torch

from graphkv.finite import check_finite
from graphkv.kernels import Kernels
from graphkv.layer import Layer
from graphkv.rows import BLOCK, unit

__all__ = ["score"]


def score(layer: Layer, kernels: Kernels) -> torch.Tensor:
    """float32 [Hkv, n]: the negative cosine of each key to the mean of all unit keys, in float64."""
    check_finite("keys", layer.keys, layer.plan.layer)
    return torch.stack([_unlikeness(head).to(torch.float32) for head in layer.keys])


def _unlikeness(keys: torch.Tensor) -> torch.Tensor:
    """float64 [n], in two passes over blocks of the keys: the mean, then the cosines."""
    blocks = range(0, keys.shape[0], BLOCK)
    total = torch.zeros(keys.shape[1], dtype=torch.float64, device=keys.device)
    for start in blocks:
        total += unit(keys[start : start + BLOCK]).sum(dim=0)
    mean = unit((total / keys.shape[0])[None])[0]
    found = torch.empty(keys.shape[0], dtype=torch.float64, device=keys.device)
    for start in blocks:
        found[start : start + BLOCK] = -(unit(keys[start : start + BLOCK]) @ mean)
    return found
