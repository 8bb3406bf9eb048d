"""The graph: candidates' scores shifted, propagated, and the best of them picked; rows of many layers in one go.

Steps 1 and 3 to 7 of docs/algorithm.md's graph section; step 2, the candidates, is `narrowing`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from graphkv.candidates import Candidates
from graphkv.kernels import Kernels, kernels_for
from graphkv.narrowing import check_candidate_keys
from graphkv.rows import Row
from graphkv.terms.errors import InvalidInputError
from graphkv.terms.policy import Graph

__all__ = ["Picked", "pick"]


@dataclass(frozen=True, slots=True)
class Picked:
    """The outcome of one layer: `kept` bool [Hkv, W] over the candidates' slots, and what it is worth."""

    kept: torch.Tensor
    kept_score_ratio: float
    changed: int


def pick(layers: Sequence[Candidates], kernels: Kernels | None = None) -> list[Picked | InvalidInputError]:
    """The contenders each layer keeps; an error is the answer of its own layer alone."""
    rows: list[list[Row] | InvalidInputError] = []
    for layer in layers:
        try:
            if layer.plan.needs_keys:
                check_candidate_keys(layer)
            rows.append(_rows(layer))
        except InvalidInputError as error:
            rows.append(error)
    good = [(layer, own) for layer, own in zip(layers, rows, strict=True) if isinstance(own, list)]
    kept = _kept([(row, layer) for layer, own in good for row in own], kernels)
    answers: list[Picked | InvalidInputError] = []
    for layer, own in zip(layers, rows, strict=True):
        answers.append(_picked(layer, own, [next(kept) for _ in own], kernels) if isinstance(own, list) else own)
    return answers


def _rows(layer: Candidates) -> list[Row]:
    """One row a KV head, scores shifted, with K and m as the plan says."""
    plan, graph = layer.plan, layer.plan.policy.graph
    keys = layer.keys if layer.similarity_keys is None else layer.similarity_keys
    unrotated = plan.policy.needs_rope and layer.similarity_keys is None
    rows = []
    for head, count in enumerate(layer.counts()):
        ids = layer.ids[head, :count].to(torch.int64)
        select = min(plan.contended, count)
        scores = layer.scores[head, :count].to(torch.float64)
        if graph is None or not plan.propagates or keys is None:
            rows.append(Row(scores, select))
            continue
        sources = graph.source_count(plan.budget, select)
        positions = None
        if unrotated:
            positions = ids if layer.positions is None else layer.positions[head].to(torch.int64)
            if layer.positions is not None:
                positions = positions[ids] if layer.indexed else positions[:count]
        rows.append(
            Row(
                _shifted(scores, layer.facts[head]),
                select,
                sources,
                graph.neighbor_count(plan.budget, sources),
                keys[head] if layer.indexed else keys[head, :count],
                ids if layer.indexed else None,
                positions,
                layer.rope if unrotated else None,
            )
        )
    return rows


def _shifted(scores: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """Step 1: less the smallest contender's score, where that is negative; decay must lower."""
    return scores - facts[1].clamp(max=0.0)


def _kept(rows: Sequence[tuple[Row, Candidates]], kernels: Kernels | None) -> Iterator[torch.Tensor]:
    """bool [C] a row, in order. Rows of one sequential strength go together; the others are independent anyway."""
    kept: list[torch.Tensor | None] = [None] * len(rows)
    together: dict[float, list[int]] = {}
    for place, (row, layer) in enumerate(rows):
        graph = layer.plan.policy.graph
        if graph is not None and layer.plan.propagates and graph.update == "sequential" and row.size > row.select:
            together.setdefault(graph.strength, []).append(place)
        else:
            kept[place] = _one_shot(row, graph if layer.plan.propagates else None, kernels)
    for strength, places in together.items():
        chosen = [rows[place][0] for place in places]
        orders = (kernels or kernels_for(chosen[0].scores.device)).sequential(chosen, strength)
        for place, row, order in zip(places, chosen, orders, strict=True):
            kept[place] = torch.zeros(row.size, dtype=torch.bool, device=order.device).index_fill_(0, order, True)
    return iter([mask for mask in kept if mask is not None])


def _one_shot(row: Row, graph: Graph | None, kernels: Kernels | None) -> torch.Tensor:
    kernels = kernels or kernels_for(row.scores.device)
    if row.size == row.select:
        return torch.ones(row.size, dtype=torch.bool, device=row.scores.device)
    updated = row.scores if graph is None or row.sources == 0 else kernels.decay(row, graph)
    return kernels.top_tokens(updated[None], row.select)[0]


def _picked(layer: Candidates, rows: list[Row], kept: list[torch.Tensor], kernels: Kernels | None) -> Picked:
    """Back to slots, with the share of the base score kept and the number of tokens the graph changed."""
    kernels = kernels or kernels_for(layer.ids.device)
    slots = torch.zeros(layer.ids.shape, dtype=torch.bool, device=layer.ids.device)
    share = torch.zeros(2, dtype=torch.float64, device=layer.ids.device)
    changed = torch.zeros((), dtype=torch.int64, device=layer.ids.device)
    for head, (row, mask) in enumerate(zip(rows, kept, strict=True)):
        slots[head, : row.size] = mask
        facts = layer.facts[head]
        scores = layer.scores[head, : row.size]
        share[0] += _shifted(scores.to(torch.float64), facts).masked_fill(~mask, 0.0).sum()
        share[1] += facts[0] - facts[1].clamp(max=0.0) * facts[2]
        if layer.plan.propagates:
            changed += (mask & ~kernels.top_tokens(scores[None], row.select)[0]).sum()
    kept_mass, mass = share.tolist()
    ratio = min(1.0, kept_mass / mass) if mass > 0.0 else 1.0
    return Picked(slots, ratio, int(changed))
