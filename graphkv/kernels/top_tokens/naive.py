"""The best tokens of each row by sorting: value descending, then index ascending."""

import torch

__all__ = ["top_tokens"]


def top_tokens(values: torch.Tensor, count: int) -> torch.Tensor:
    """bool [R, n]: the `count` best of each row of `values` [R, n]; ties to the lower index; -inf is never kept."""
    kept = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    for row, line in enumerate(values.tolist()):
        order = sorted(range(len(line)), key=lambda token: (-line[token], token))
        for token in order[:count]:
            kept[row, token] = line[token] > float("-inf")
    return kept
