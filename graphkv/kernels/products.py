"""Dot products of many vectors in tiles of one fixed shape, so that a result depends on its two vectors alone.

A matrix product of another shape, alignment or thread count may add up in another order; with every call padded to the
same tile it does not (measured: docs/performance.md). On a GPU the products are formed in float64, which no TF32 setting
of the process touches, and rounded once.
"""

import torch

__all__ = ["padded", "products"]

_ROWS = 64
_COLUMNS = 512
_GPU_COLUMNS = 8192


def padded(count: int, step: int) -> int:
    """`count` rounded up to a multiple of `step`."""
    return -(-count // step) * step


def products(left: torch.Tensor, right: torch.Tensor, *, columns: int | None = None) -> torch.Tensor:
    """float32 [M, N]: left [M, d] times right [N, d] transposed; any float dtype, accumulated in float32 or better.

    A view of rows that lie next to each other, or further apart. With `columns` >= N the result is that wide, and what is
    beyond N is undefined.
    """
    rows, count = left.shape[0], right.shape[0]
    wide = max(count, columns or 0)
    if left.device.type != "cpu":
        out = torch.empty(rows, wide, dtype=torch.float32, device=left.device)
        exact = left.to(torch.float64)
        for start in range(0, count, _GPU_COLUMNS):
            tile = right[start : start + _GPU_COLUMNS].to(torch.float64)
            out[:, start : start + tile.shape[0]] = exact @ tile.T
        return out
    out = torch.empty(rows, padded(wide, _COLUMNS), dtype=torch.float32)
    upper = torch.zeros(padded(rows, _ROWS), left.shape[1], dtype=torch.float32)
    upper[:rows] = left
    spare = None if rows == upper.shape[0] else torch.empty(upper.shape[0], _COLUMNS, dtype=torch.float32)
    tile = torch.empty(_COLUMNS, left.shape[1], dtype=torch.float32)
    for start in range(0, count, _COLUMNS):
        given = right[start : start + _COLUMNS]
        tile[: given.shape[0]] = given
        tile[given.shape[0] :] = 0.0
        place = out[:, start : start + _COLUMNS]
        torch.mm(upper, tile.T, out=place if spare is None else spare)
        if spare is not None:
            place.copy_(spare[:rows])
    return out[:, :wide]
