"""A layer's attention, given or computed, in bounded pieces: what the scorers that look at it have in common."""

from collections.abc import Iterator

import torch

from graphkv.finite import check_finite
from graphkv.kernels.attention import blocks_of
from graphkv.layer import Layer

__all__ = ["attention_blocks"]


def attention_blocks(layer: Layer, last: int = 0) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(first query head, first row, float32 [heads, rows, n]): the attention a layer's caller gave, or gave queries for.

    last: only so many last rows of it, and no more is read; 0 = all. Raises InvalidInputError (NON_FINITE) where what is
    read is not finite.
    """
    if layer.attention is None:
        if layer.queries is None:
            raise TypeError("a layer without a source of importance passed its own check")
        queries = layer.queries[:, -last:]
        check_finite("queries", queries, layer.plan.layer)
        check_finite("keys", layer.keys, layer.plan.layer)
        yield from blocks_of(queries, layer.keys)
        return
    rows = layer.attention[:, -last:]
    check_finite("attention", rows, layer.plan.layer)
    for head, given in enumerate(rows):
        yield head, 0, given.to(torch.float32)[None]
