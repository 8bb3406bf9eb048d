"""Budgets that depend on all layers: CAKE (arXiv:2503.12491), more where attention is spread out and wavers.

Knows the attention of a prompt's layers; the arithmetic of shares is in `budgets`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from graphkv.attention import attention_blocks
from graphkv.budgets import allocated_plans
from graphkv.layer import Layer
from graphkv.terms.policy import Policy

__all__ = ["allocate", "attention_spread"]

_FLOOR = 1e-10
"""What the authors add to an attention before its logarithm."""


def allocate(layers: Sequence[Layer]) -> list[Layer]:
    """All layers of one prompt, in order, with the budgets that their policy gives them.

    Raises InvalidInputError (NON_FINITE) naming a layer whose attention or keys and queries are not finite.
    """
    plans = [layer.plan for layer in layers]
    if all(plan.allocated for plan in plans):
        return list(layers)
    weights = _weights([attention_spread(layer) for layer in layers], plans[0].policy)
    return [replace(layer, plan=plan) for layer, plan in zip(layers, allocated_plans(plans, weights), strict=True)]


def _weights(spreads: Sequence[tuple[float, float]], policy: Policy) -> list[float]:
    """H^(1/tau1) V^(1/tau2) of each layer over the largest of them (a small tau would overflow); 0 where H or V is."""
    tau1, tau2 = policy.option("tau1"), policy.option("tau2")
    logs = [
        math.log(entropy) / tau1 + math.log(variance) / tau2 if entropy > 0.0 and variance > 0.0 else -math.inf
        for entropy, variance in spreads
    ]
    largest = max(logs)
    return [math.exp(log - largest) if log > -math.inf else 0.0 for log in logs]


def attention_spread(layer: Layer) -> tuple[float, float]:
    """Entropy H and variance V of the attention that the window's rows pay to the n - w tokens before it.

    H = -sum a ln(a + 1e-10) over query heads, rows and tokens; V = the sum of the sample variances over the rows (0 for one
    row). Attention in float32, sums in float64.
    """
    window = layer.plan.window
    before = layer.plan.num_tokens - window
    device = layer.keys.device
    entropy, deviation = torch.zeros(2, dtype=torch.float64, device=device)
    rows = 0  # of these heads, so far: all rows of one block of heads come before the next block
    for _, _, attention in attention_blocks(layer, last=window):  # a scorer may take more rows than the window has
        if rows == 0:
            total, squares = torch.zeros(2, attention.shape[0], before, dtype=torch.float64, device=device)
        for offset, head in enumerate(attention):
            own = head[:, :before].to(torch.float64)
            entropy -= (own * torch.log(own + _FLOOR)).sum()
            total[offset] += own.sum(dim=0)
            squares[offset] += own.square().sum(dim=0)
        rows = (rows + attention.shape[1]) % window
        if rows == 0:
            deviation += (squares - total.square() / window).clamp_(min=0.0).sum()
    return float(entropy), float(deviation) / (window - 1) if window > 1 else 0.0
