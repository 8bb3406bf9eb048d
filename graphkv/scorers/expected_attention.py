"""ExpectedAttention (arXiv:2510.00636): a token matters as much as queries still to come are expected to attend to it.

Knows one layer's keys, the norms of its values and what is known of its future queries; see `graphkv.rope.average_rope`.
"""

import math

import torch

from graphkv.finite import check_finite
from graphkv.kernels import Kernels
from graphkv.kernels.products import products
from graphkv.layer import Layer

__all__ = ["score"]

_TOKENS = 8192  # at a time: the products of all tokens with a covariance would be larger than the keys


def score(layer: Layer, kernels: Kernels) -> torch.Tensor:
    """float32 [Hkv, n]: softmax(k mu / sqrt(d) + k Sigma k / 2d), averaged over the group, times the value's norm.

    The softmax is over all tokens, in float64; products in float32.
    """
    mean, covariance, norms = layer.query_mean, layer.query_covariance, layer.value_norms
    if mean is None or covariance is None or norms is None:
        raise TypeError("a layer without what its scorer needs passed its own check")
    check_finite("keys", layer.keys, layer.plan.layer)
    for role, tensor in (("query_mean", mean[..., None]), ("query_covariance", covariance), ("value_norms", norms[..., None])):
        check_finite(role, tensor, layer.plan.layer)
    expected = torch.zeros(norms.shape, dtype=torch.float64, device=layer.keys.device)
    for head in range(mean.shape[0]):
        own = head // layer.group
        expected[own] += torch.softmax(_logits(layer.keys[own], mean[head], covariance[head]), dim=-1)
    return (expected / layer.group * norms.to(torch.float64)).to(torch.float32)


def _logits(keys: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """float64 [n]."""
    dim = keys.shape[-1]
    rows = torch.cat([covariance.T, mean[None]]).to(torch.float32)
    logits = torch.empty(keys.shape[0], dtype=torch.float64, device=keys.device)
    for start in range(0, keys.shape[0], _TOKENS):
        own = keys[start : start + _TOKENS]
        product = products(rows, own).to(torch.float64)  # [d + 1, tokens]
        spread = (product[:dim] * own.to(torch.float64).T).sum(dim=0)
        logits[start : start + _TOKENS] = product[dim] / math.sqrt(dim) + spread / (2 * dim)
    return logits
