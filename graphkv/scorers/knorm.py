"""KNorm (arXiv:2406.11430): a token matters the more, the shorter its key.

Knows one layer's keys; nothing of budgets, the graph or the wire.
"""

import torch

from graphkv.finite import check_finite
from graphkv.kernels import Kernels
from graphkv.layer import Layer
from graphkv.rows import lengths

__all__ = ["score"]


def score(layer: Layer, kernels: Kernels) -> torch.Tensor:
    """float32 [Hkv, n]: the negative length of each key, summed in float64."""
    check_finite("keys", layer.keys, layer.plan.layer)
    return -torch.stack([lengths(head).to(torch.float32) for head in layer.keys])
