"""KeyDiff (arXiv:2504.15364): a token matters the more, the less its key looks like the average one.

Knows one layer's keys; nothing of budgets, the graph or the wire.
"""

import torch

from graphkv.finite import check_finite
from graphkv.kernels import Kernels
from graphkv.layer import Layer
from graphkv.rows import unit

__all__ = ["score"]


def score(layer: Layer, kernels: Kernels) -> torch.Tensor:
    """float32 [Hkv, n]: the negative cosine of each key to the mean of all unit keys, in float64."""
    check_finite("keys", layer.keys, layer.plan.layer)
    return torch.stack([_unlikeness(head) for head in layer.keys]).to(torch.float32)


def _unlikeness(keys: torch.Tensor) -> torch.Tensor:
    own = unit(keys)
    return -(own @ unit(own.mean(dim=0, keepdim=True))[0])
