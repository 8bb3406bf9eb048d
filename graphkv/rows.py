"""Row: one KV head of one layer of one prompt, as the kernels see it, and Updated, what they make of it.

Its unit keys are made when they are asked for.
"""

from dataclasses import dataclass

import torch

from graphkv.rope import unrotate
from graphkv.terms.rope import Rope

__all__ = ["BLOCK", "Row", "Updated", "lengths", "unit"]

BLOCK = 8192
"""Tokens whose keys are held in float64 at a time."""


@dataclass(frozen=True, slots=True)
class Row:
    """The C candidates of one KV head, in ascending token order, so that the lower index is the lower position.

    scores float64 [C]: base scores, shifted so that none is negative. keys [C, d] in the caller's dtype, or [n, d] with
    `index` int64 [C] pointing into it. positions int64 [C]; None unless the keys are to be unrotated by `rope`.
    select: how many to keep (B_sel, never more than C). sources: K. neighbors: m, None = no limit.
    """

    scores: torch.Tensor
    select: int
    sources: int = 0
    neighbors: int | None = None
    keys: torch.Tensor | None = None
    index: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    rope: Rope | None = None

    @property
    def size(self) -> int:
        """C."""
        return self.scores.shape[0]

    def unit_keys(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[C, d]: each candidate's key (before rotary embedding, where asked for) over its norm."""
        if self.keys is None:
            raise TypeError("a row whose graph reads no keys was asked for them")
        made = torch.empty(self.size, self.keys.shape[-1], dtype=dtype, device=self.keys.device)
        for start in range(0, self.size, BLOCK):
            place = slice(start, min(start + BLOCK, self.size))
            keys = self.keys[place] if self.index is None else self.keys.index_select(0, self.index[place])
            if self.rope is not None and self.positions is not None:
                keys = unrotate(keys, self.positions[place], self.rope)
            made[place] = unit(keys)
        return made


@dataclass(frozen=True, slots=True)
class Updated:
    """A row after the graph, candidate by candidate.

    scores float64 [C]: updated scores; evicted ones are -1 - rank. factors float64 [C]: what the base scores were
    multiplied with, 0 for an evicted one. Sequential alone: order int64 [B_sel], whom it kept, first to last; level
    float64 [C], the logarithms of the updated scores, which underflow. Both of those are as they were when a candidate
    was kept, and as they are at the end for the rest.
    """

    scores: torch.Tensor
    factors: torch.Tensor
    order: torch.Tensor | None = None
    level: torch.Tensor | None = None

    @property
    def comparable(self) -> torch.Tensor:
        """float64 [C]: what candidates of different rows are compared by."""
        return self.scores if self.level is None else self.level


def lengths(vectors: torch.Tensor) -> torch.Tensor:
    """float64 [n]: the length of each of [n, d], any float dtype, a block at a time."""
    found = torch.empty(vectors.shape[0], dtype=torch.float64, device=vectors.device)
    for start in range(0, vectors.shape[0], BLOCK):
        own = vectors[start : start + BLOCK].to(torch.float64)
        found[start : start + BLOCK] = torch.linalg.vector_norm(own, dim=-1)
    return found


def unit(keys: torch.Tensor) -> torch.Tensor:
    """float64 [C, d]: keys over their norms; a zero key stays zero.

    Norms in float64: a sum of squares in float32 underflows for norms of 1e-20, in fp16 it overflows past 256.
    """
    wide = keys.to(torch.float64)
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide / torch.where(norms > 0, norms, 1.0)
