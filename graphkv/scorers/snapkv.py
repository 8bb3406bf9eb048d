"""SnapKV (arXiv:2404.14469): a token matters as much as the end of the prompt attends to it.

Knows one layer's keys and window queries; nothing of budgets, the graph or the wire.
"""

import torch
import torch.nn.functional as F  # noqa: N812  # the name everybody knows

from graphkv.finite import check_finite
from graphkv.kernels import Kernels
from graphkv.layer import Layer
from graphkv.terms.policy import Policy

__all__ = ["pool", "received", "score"]


def score(layer: Layer, kernels: Kernels) -> torch.Tensor:
    """Returns float32 [Hkv, n - w] on the keys' device; the window's own tokens are always kept, so they have no score."""
    pooled = pool(received(layer, kernels), layer.plan.policy)
    return pooled.view(layer.kv_heads, layer.group, -1).mean(dim=1).to(torch.float32)


def received(layer: Layer, kernels: Kernels) -> torch.Tensor:
    """float64 [Hq, n - w]: the attention each token before the window receives, averaged over the window's queries."""
    if layer.attention is None:
        if layer.queries is None:
            raise TypeError("a layer without a source of importance passed its own check")
        check_finite("queries", layer.queries, layer.plan.layer)
        check_finite("keys", layer.keys, layer.plan.layer)
        return kernels.window_scores(layer.queries, layer.keys)
    check_finite("attention", layer.attention, layer.plan.layer)
    before = layer.plan.num_tokens - layer.plan.window
    heads = [head[:, :before].to(torch.float32).mean(dim=0, dtype=torch.float64) for head in layer.attention]
    return torch.stack(heads)


def pool(attention: torch.Tensor, policy: Policy) -> torch.Tensor:
    """Smoothed over neighboring tokens, [Hq, n - w]: avg pads with zeros and always divides by the width; max with -inf."""
    width = policy.effective_pool_width
    if attention.shape[-1] == 0 or width == 1:
        return attention
    if policy.pooling == "max":
        return F.max_pool1d(attention, width, stride=1, padding=width // 2)
    return F.avg_pool1d(attention, width, stride=1, padding=width // 2)
