"""Sequential propagation by the formula: keep the best, lower its look-alikes, again; in float64, one row at a time."""

import math
from collections.abc import Sequence

import torch

from graphkv.kernels.decay.naive import edges_of
from graphkv.rows import Row, Updated

__all__ = ["sequential"]


def sequential(rows: Sequence[Row], strength: float) -> list[Updated]:
    """Each row after sequential propagation."""
    return [_choose(row, strength) for row in rows]


def _choose(row: Row, strength: float) -> Updated:
    unit = row.unit_keys(torch.float64)
    start = [math.log(score) if score > 0.0 else -math.inf for score in row.scores.tolist()]
    logs = [0.0] * row.size
    left, order = set(range(row.size)), []
    for _ in range(row.select):
        best = min(left, key=lambda token: (-(start[token] + logs[token]), token))
        order.append(best)
        left.remove(best)
        for token, edge in enumerate(edges_of(unit, best)):
            if token in left:
                factor = 1.0 - strength * edge
                logs[token] += math.log(factor) if factor > 0.0 else -math.inf
    device = row.scores.device
    factors = torch.tensor(logs, dtype=torch.float64, device=device).exp()
    level = torch.tensor([first + log for first, log in zip(start, logs, strict=True)], dtype=torch.float64, device=device)
    return Updated(row.scores * factors, factors, torch.tensor(order, dtype=torch.int64, device=device), level)
