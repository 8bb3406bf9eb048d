"""One-shot propagation in bounded memory: a block of sources against all candidates at a time, cosines in float32.

The m-th neighbor is exact: `top_tokens` decides ties to the lower index. Factors multiply in float64, where the order of
multiplication does not show.
"""

import torch

from graphkv.kernels.allowance import allowance
from graphkv.kernels.products import products
from graphkv.kernels.top_tokens.chunked import top_tokens
from graphkv.rows import Row, Updated
from graphkv.terms.policy import Graph

__all__ = ["decay", "edges_of_sources"]

SAME = 1.0 - 2.0**-16
FLOAT32_MAX = float(torch.finfo(torch.float32).max)
_BLOCK = 64  # sources at a time, fewer where there are many candidates
_EDGES = 16 * 2**20  # bytes of similarities held at once, in float32
_FACTORS = 8 * 2**20  # and of factors, in float64


def decay(row: Row, graph: Graph) -> Updated:
    """See `naive`."""
    is_source = top_tokens(row.scores[None], row.sources)[0]
    places = is_source.nonzero()[:, 0]
    best_first = torch.sort(row.scores[places], descending=True, stable=True).indices
    sources = places[best_first]
    unit = row.unit_keys()
    signal = torch.full_like(row.scores, 0.0 if graph.update == "additive" else 1.0)
    touched = torch.zeros_like(is_source)
    sign = 1.0 if graph.signal == "enhance" else -1.0
    block = min(_BLOCK, max(1, allowance(unit.device, _EDGES) // (4 * row.size)))
    for start in range(0, sources.shape[0], block):
        edges = edges_of_sources(unit[sources[start : start + block]], unit, is_source, row.neighbors, graph.threshold)
        for part in edges.split(max(1, allowance(unit.device, _FACTORS) // (8 * row.size))):
            touched |= (part > 0.0).any(dim=0)
            sent = part.to(torch.float64).mul_(sign * graph.strength)
            if graph.update == "additive":
                signal += sent.sum(dim=0)
            else:
                signal *= sent.add_(1.0).prod(dim=0)
    if graph.signal == "evict":
        return Updated(_evicted(row.scores, touched), (~touched).to(torch.float64))
    if graph.update == "additive":
        return Updated((row.scores + signal * row.scores).clamp_(max=FLOAT32_MAX), signal.add_(1.0))
    factors = signal.pow_(graph.rounds).clamp_(max=1e300)  # finite, so that 0 stays 0
    return Updated((row.scores * factors).clamp_(max=FLOAT32_MAX), factors)


def edges_of_sources(
    sources: torch.Tensor, unit: torch.Tensor, is_source: torch.Tensor, most: int | None, threshold: float
) -> torch.Tensor:
    """float32 [block, C]: each source's similarity to its neighbors, 0 to all others."""
    edges = products(sources, unit).clamp_(0.0, 1.0)
    edges.masked_fill_(edges >= SAME, 1.0)
    edges.masked_fill_(is_source, 0.0)
    edges.masked_fill_(edges < threshold, 0.0)
    if most is not None and most < unit.shape[0]:
        edges.masked_fill_(~top_tokens(edges, most), 0.0)
    return edges


def _evicted(scores: torch.Tensor, touched: torch.Tensor) -> torch.Tensor:
    """Evicted tokens below all others, their order kept: -1 - rank among the evicted."""
    updated = scores.clone()
    places = touched.nonzero()[:, 0]
    order = torch.sort(scores[places], descending=True, stable=True).indices
    ranks = torch.arange(places.shape[0], dtype=torch.float64, device=scores.device)
    updated[places[order]] = -1.0 - ranks
    return updated
