"""The caller's own scores, from whatever measures importance there: H2O's running sum, KVzip, a model of their own."""

import torch

from graphkv.kernels import Kernels
from graphkv.layer import Layer

__all__ = ["score"]


def score(layer: Layer, kernels: Kernels) -> torch.Tensor:
    """float32 [Hkv, n]: `layer.scores`."""
    if layer.scores is None:
        raise TypeError("a layer without a source of importance passed its own check")
    return layer.scores.to(torch.float32)
