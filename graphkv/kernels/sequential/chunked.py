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
from graphkv.rows import Row, Updated

__all__ = ["sequential"]

_COSINES = 64 * 2**20  # bytes held at once
_WIDEST = 4096  # the most candidates whose cosines are formed ahead; the same on every device
_LOWEST = -1e300  # what is left of a score of 0, or after a factor of 0: all equal, and above what is kept already


def sequential(rows: Sequence[Row], strength: float) -> list[Updated]:
    """See `naive`."""
    updated: list[Updated] = []
    for group in _groups(rows):
        if group[0].size > _WIDEST:
            updated.extend(_choose([row], _Lines(row), strength)[0] for row in group)
        else:
            updated.extend(_choose(group, _Squares(group), strength))
    return updated


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


def _choose(rows: Sequence[Row], cosines: _Squares | _Lines, strength: float) -> list[Updated]:
    widest, steps = max(row.size for row in rows), max(row.select for row in rows)
    device = rows[0].scores.device
    start = torch.zeros(len(rows), widest, dtype=torch.float64, device=device)  # ln s
    taken = torch.ones(len(rows), widest, dtype=torch.bool, device=device)
    for line, own, row in zip(start, taken, rows, strict=True):
        line[: row.size] = row.scores.log()
        own[: row.size] = False
    logs = torch.zeros_like(start)  # of the factors so far
    level = torch.empty_like(start)
    order = torch.empty(len(rows), steps, dtype=torch.int64, device=device)
    at_choice = torch.empty(len(rows), steps, dtype=torch.float64, device=device)
    ends: dict[int, list[int]] = {}  # after how many steps a row has kept all it keeps
    for place, row in enumerate(rows):
        ends.setdefault(row.select, []).append(place)
    final = torch.empty_like(logs)
    for step in range(steps + 1):
        done = ends.get(step, ())
        for place in done:
            final[place] = logs[place]
        if step == steps:
            break
        torch.add(start, logs, out=level).clamp_(min=_LOWEST).masked_fill_(taken, -math.inf)
        kept = level.argmax(dim=1)  # the first of equals, as torch documents of argmax and not of max
        taken.scatter_(1, kept[:, None], True)
        order[:, step] = kept
        at_choice[:, step] = logs.gather(1, kept[:, None])[:, 0]
        logs += torch.log1p(cosines.of(kept).to(torch.float64).mul_(-strength))
    return [_updated(row, *own) for row, *own in zip(rows, start, final, order, at_choice, strict=True)]


def _updated(row: Row, start: torch.Tensor, logs: torch.Tensor, order: torch.Tensor, at_choice: torch.Tensor) -> Updated:
    order = order[: row.select].clone()
    logs = logs[: row.size].index_copy(0, order, at_choice[: row.select])
    factors = logs.exp()
    return Updated(row.scores * factors, factors, order, start[: row.size] + logs)
