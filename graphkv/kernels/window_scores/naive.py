"""Attention received from the observation window, by the formula: one query at a time, in float64."""

import math

import torch

__all__ = ["window_scores"]


def window_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """float64 [Hq, n - w]: softmax(q k^T / sqrt(d)), causal inside the window, averaged over the w queries.

    queries [Hq, w, d], the last w tokens'; keys [Hkv, n, d]. SnapKV, arXiv:2404.14469.
    """
    heads, window, dim = queries.shape
    tokens = keys.shape[1]
    group = heads // keys.shape[0]
    received = torch.zeros(heads, tokens - window, dtype=torch.float64, device=keys.device)
    for head in range(heads):
        own = keys[head // group].to(torch.float64)
        for row in range(window):
            seen = own[: tokens - window + row + 1]
            attention = torch.softmax(seen @ queries[head, row].to(torch.float64) / math.sqrt(dim), dim=0)
            received[head] += attention[: tokens - window] / window
    return received
