"""Sequential propagation by the formula: keep the best, lower its look-alikes, again; in float64, one row at a time."""

import math
from collections.abc import Sequence

import torch

from graphkv.kernels.decay.naive import edges_of
from graphkv.rows import Row

__all__ = ["sequential"]


def sequential(rows: Sequence[Row], strength: float) -> list[torch.Tensor]:
    """int64 [B_sel] a row: the candidates kept, in the order of choice."""
    return [torch.tensor(_choose(row, strength), dtype=torch.int64, device=row.scores.device) for row in rows]


def _choose(row: Row, strength: float) -> list[int]:
    unit = row.unit_keys(torch.float64)
    level = [math.log(score) if score > 0.0 else -math.inf for score in row.scores.tolist()]
    left, order = set(range(row.size)), []
    for _ in range(row.select):
        best = min(left, key=lambda token: (-level[token], token))
        order.append(best)
        left.remove(best)
        for token, edge in enumerate(edges_of(unit, best)):
            factor = 1.0 - strength * edge
            level[token] += math.log(factor) if factor > 0.0 else -math.inf
    return order
