"""Sequential propagation for many rows at a time: their cosines once, then one step of all rows after the other.

Cosines in float32, sums of logs in float64. A row too wide for its C x C cosines (no candidates) gets one line of them
a step instead, which is slow and small.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from graphkv.kernels.allowance import allowance
from graphkv.kernels.decay.chunked import SAME
from graphkv.kernels.products import products
from graphkv.rows import Row

__all__ = ["sequential"]

_COSINES = 64 * 2**20  # bytes held at once
_WIDEST = 4096  # the most candidates whose cosines are formed ahead; the same on every device


def sequential(rows: Sequence[Row], strength: float) -> list[torch.Tensor]:
    """int64 [B_sel] a row, in the order of choice; see `naive`."""
    order: list[torch.Tensor] = []
    for group in _groups(rows):
        if group[0].size > _WIDEST:
            order.extend(_choose([row], _Lines(row), strength)[0] for row in group)
        else:
            order.extend(_choose(group, _Squares(group), strength))
    return order


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Neighboring rows that fit into the memory limit together."""
    group: list[Row] = []
    widest = 0
    for row in rows:
        limit = allowance(row.scores.device, _COSINES)
        widest = max(widest, row.size)
        if group and (4 * widest**2 * (len(group) + 1) > limit or (row.size > _WIDEST) != (group[0].size > _WIDEST)):
            yield group
            group, widest = [], row.size
        group.append(row)
    if group:
        yield group


class _Squares:
    """All cosines of a group of rows, formed ahead: float32 [R, C, C]."""

    def __init__(self, rows: Sequence[Row]) -> None:
        widest = max(row.size for row in rows)
        device = rows[0].scores.device
        self._cosines = torch.zeros(len(rows), widest, widest, dtype=torch.float32, device=device)
        self._rows = torch.arange(len(rows), device=device)
        for place, row in zip(self._cosines, rows, strict=True):
            unit = row.unit_keys()
            place[: row.size, : row.size] = products(unit, unit)
        _snap(self._cosines)

    def of(self, kept: torch.Tensor) -> torch.Tensor:
        """float32 [R, C]: the cosines of the token each row just kept."""
        return self._cosines[self._rows, kept]


class _Lines:
    """One row's cosines, a line at a time; in float64, where no order of adding up shows after rounding."""

    def __init__(self, row: Row) -> None:
        self._unit = row.unit_keys().to(torch.float64)

    def of(self, kept: torch.Tensor) -> torch.Tensor:
        """float32 [1, C]."""
        return _snap((self._unit @ self._unit[kept[0]]).to(torch.float32)[None])


def _snap(cosines: torch.Tensor) -> torch.Tensor:
    """Clamped to [0, 1]; a duplicate's cosine is 1 whatever the rounding. In place."""
    return cosines.clamp_(0.0, 1.0).masked_fill_(cosines >= SAME, 1.0)


def _choose(rows: Sequence[Row], cosines: _Squares | _Lines, strength: float) -> list[torch.Tensor]:
    widest, steps = max(row.size for row in rows), max(row.select for row in rows)
    device = rows[0].scores.device
    level = torch.full((len(rows), widest), -math.inf, dtype=torch.float64, device=device)
    for line, row in zip(level, rows, strict=True):
        line[: row.size] = row.scores.log()
    order = torch.empty(len(rows), steps, dtype=torch.int64, device=device)
    best = torch.empty(len(rows), steps, dtype=torch.float64, device=device)
    for step in range(steps):
        kept = level.argmax(dim=1)  # the first of equals, as torch documents of argmax and not of max
        order[:, step] = kept
        best[:, step] = level.gather(1, kept[:, None])[:, 0]
        level += torch.log1p(cosines.of(kept).to(torch.float64).mul_(-strength))
        level.scatter_(1, kept[:, None], -math.inf)
    return [_finished(row, *answer) for row, *answer in zip(rows, order, best, strict=True)]


def _finished(row: Row, order: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """The order of choice; once every candidate left is at -inf, the rest follow by index."""
    order, best = order[: row.select], best[: row.select]
    chosen = int((best > -math.inf).sum())
    if chosen == row.select:
        return order
    left = torch.ones(row.size, dtype=torch.bool, device=order.device)
    left[order[:chosen]] = False
    return torch.cat([order[:chosen], left.nonzero()[: row.select - chosen, 0]])
