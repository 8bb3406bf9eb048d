"""One table: operation x kind of device -> implementation.

Each operation has a `naive` form (the formula, loops allowed, the tests' measure) and a `chunked` one (torch operations in
bounded memory, any device); all forms of an operation have one signature.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from graphkv.kernels.decay import chunked as decay_chunked
from graphkv.kernels.decay import naive as decay_naive
from graphkv.kernels.sequential import chunked as sequential_chunked
from graphkv.kernels.sequential import naive as sequential_naive
from graphkv.kernels.top_tokens import chunked as top_tokens_chunked
from graphkv.kernels.top_tokens import naive as top_tokens_naive
from graphkv.kernels.window_scores import chunked as window_scores_chunked
from graphkv.kernels.window_scores import naive as window_scores_naive
from graphkv.rows import Row, Updated
from graphkv.terms.policy import Graph

__all__ = ["CHUNKED", "KERNELS", "NAIVE", "Kernels", "kernels_for"]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of one kind of device."""

    window_scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    top_tokens: Callable[[torch.Tensor, int], torch.Tensor]
    decay: Callable[[Row, Graph], Updated]
    sequential: Callable[[Sequence[Row], float], list[Updated]]


CHUNKED = Kernels(
    window_scores_chunked.window_scores,
    top_tokens_chunked.top_tokens,
    decay_chunked.decay,
    sequential_chunked.sequential,
)
NAIVE = Kernels(
    window_scores_naive.window_scores,
    top_tokens_naive.top_tokens,
    decay_naive.decay,
    sequential_naive.sequential,
)
KERNELS: Mapping[str, Kernels] = MappingProxyType({"cpu": CHUNKED, "cuda": CHUNKED})


def kernels_for(device: torch.device) -> Kernels:
    """The operations for a device; torch's own where there is nothing better."""
    return KERNELS.get(device.type, CHUNKED)
