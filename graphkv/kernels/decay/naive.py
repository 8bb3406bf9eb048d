"""One-shot propagation by the formula (GraphKV, arXiv:2509.00388): loops over sources and neighbors, in float64."""

import torch

from graphkv.rows import Row, Updated
from graphkv.terms.policy import Graph

__all__ = ["decay", "edges_of", "neighbors_of"]

SAME = 1.0 - 2.0**-16
FLOAT32_MAX = float(torch.finfo(torch.float32).max)


def decay(row: Row, graph: Graph) -> Updated:
    """The row after one-shot propagation; for "evict" a score is -1 - rank among the evicted where a token is evicted."""
    order = sorted(range(row.size), key=lambda token: (-float(row.scores[token]), token))
    sources = order[: row.sources]
    unit = row.unit_keys(torch.float64)
    factors, totals, evicted = [1.0] * row.size, [0.0] * row.size, set()
    sign = 1.0 if graph.signal == "enhance" else -1.0
    for source in sources:
        edges = edges_of(unit, source)
        for token in neighbors_of(edges, set(sources), row.neighbors, graph.threshold):
            factors[token] *= 1.0 + sign * graph.strength * edges[token]
            totals[token] += sign * graph.strength * edges[token]
            evicted.add(token)
    updated = row.scores.tolist()
    if graph.signal == "evict":
        for rank, token in enumerate(token for token in order if token in evicted):
            updated[token] = -1.0 - rank
        factors = [0.0 if token in evicted else 1.0 for token in range(row.size)]
    elif graph.update == "additive":
        updated = [score + total * score for score, total in zip(updated, totals, strict=True)]
        factors = [1.0 + total for total in totals]
    else:
        for _ in range(graph.rounds):
            updated = [score * factor for score, factor in zip(updated, factors, strict=True)]
        factors = [factor**graph.rounds for factor in factors]
    device = row.scores.device
    scores = torch.tensor(updated, dtype=torch.float64, device=device).clamp_(max=FLOAT32_MAX)
    return Updated(scores, torch.tensor(factors, dtype=torch.float64, device=device))


def edges_of(unit: torch.Tensor, source: int) -> list[float]:
    """The cosine of one source to every candidate, clamped to [0, 1]; a duplicate's is 1 whatever the rounding."""
    cosines = (unit @ unit[source]).clamp(0.0, 1.0).tolist()
    return [1.0 if cosine >= SAME else cosine for cosine in cosines]


def neighbors_of(edges: list[float], sources: set[int], most: int | None, threshold: float) -> list[int]:
    """The `most` candidates most similar to a source, sources excluded; ties to the lower index."""
    allowed = [token for token, edge in enumerate(edges) if token not in sources and edge > 0.0 and edge >= threshold]
    return sorted(allowed, key=lambda token: (-edges[token], token))[:most]
