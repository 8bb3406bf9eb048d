"""Attention received from the observation window, with at most a few query heads' logits in memory at a time."""

import torch

from graphkv.kernels.attention import blocks_of

__all__ = ["window_scores"]


def window_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """float64 [Hq, n - w]; see `naive`. Logits and softmax in float32, the sum over the window in float64."""
    window = queries.shape[1]
    before = keys.shape[1] - window
    received = torch.zeros(queries.shape[0], before, dtype=torch.float64, device=keys.device)
    for first, _, attention in blocks_of(queries, keys):
        for offset, head in enumerate(attention):
            received[first + offset] += head[:, :before].sum(dim=0, dtype=torch.float64)
    return received.div_(window)
