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


def padded(count: int, step: int = _ROWS) -> int:
    """`count` rounded up to a multiple of `step`."""
    return -(-count // step) * step


def products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """float32 [M, N]: left [M, d] times right [N, d] transposed; any float dtype, accumulated in float32 or better."""
    columns = right.shape[0]
    out = torch.empty(left.shape[0], columns, dtype=torch.float32, device=left.device)
    if left.device.type != "cpu":
        wide = left.to(torch.float64)
        for start in range(0, columns, _GPU_COLUMNS):
            tile = right[start : start + _GPU_COLUMNS].to(torch.float64)
            out[:, start : start + _GPU_COLUMNS] = wide @ tile.T
        return out
    step = _COLUMNS
    upper = torch.zeros(padded(left.shape[0]), left.shape[1], dtype=torch.float32)
    upper[: left.shape[0]] = left
    tile = torch.zeros(step, left.shape[1], dtype=torch.float32)
    result = torch.empty(upper.shape[0], step, dtype=torch.float32)
    for start in range(0, columns, step):
        rows = right[start : start + step]
        tile[: rows.shape[0]] = rows
        tile[rows.shape[0] :] = 0.0
        torch.mm(upper, tile.T, out=result)
        out[:, start : start + step] = result[: left.shape[0], : rows.shape[0]]
    return out
