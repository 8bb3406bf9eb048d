"""The best tokens of each row without sorting: `torch.topk` finds the cut, we decide the ties (it promises nothing there)."""

import math

import torch

__all__ = ["top_tokens"]


def top_tokens(values: torch.Tensor, count: int) -> torch.Tensor:
    """bool [R, n]; see `naive`. All above the count-th largest value, then those equal to it from the left."""
    count = min(count, values.shape[-1])
    if count <= 0 or values.numel() == 0:
        return torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    cut = torch.topk(values, count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    kept = values > cut
    level = values == cut
    room = count - kept.sum(dim=-1, keepdim=True)
    if bool((level.sum(dim=-1, keepdim=True) > room).any()):
        level &= level.cumsum(dim=-1, dtype=torch.int32) <= room
    kept |= level
    return kept.logical_and_(values > -math.inf)
