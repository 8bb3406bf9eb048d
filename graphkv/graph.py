"""The graph: candidates' scores shifted and propagated, rows of many layers in one go.

Steps 1 and 3 to 6 of docs/algorithm.md's graph section; step 2, the candidates, is `narrowing`, step 7, the selection,
`heads` and `granularity`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphkv.candidates import Candidates
from graphkv.kernels import Kernels, kernels_for
from graphkv.narrowing import check_candidate_keys
from graphkv.rows import Row, Updated
from graphkv.terms.errors import InvalidInputError

__all__ = ["Propagation", "propagate"]


@dataclass(frozen=True, slots=True)
class Propagation:
    """One layer after the graph: its rows, one a KV head, and what became of them; None where their scores stay."""

    layer: Candidates
    rows: list[Row]
    updated: list[Updated | None]

    def values(self, head: int) -> torch.Tensor:
        """float64 [C]: the candidates' updated scores, or their base scores where nothing propagates."""
        updated = self.updated[head]
        return self.rows[head].scores if updated is None else updated.scores


def propagate(layers: Sequence[Candidates], kernels: Kernels | None = None) -> list[Propagation | InvalidInputError]:
    """Each layer after the graph; an error is the answer of its own layer alone."""
    rows: list[list[Row] | InvalidInputError] = []
    for layer in layers:
        try:
            if layer.plan.needs_keys:
                check_candidate_keys(layer)
            rows.append(_rows(layer))
        except InvalidInputError as error:
            rows.append(error)
    good = [(layer, own) for layer, own in zip(layers, rows, strict=True) if isinstance(own, list)]
    updated = iter(_updated([(row, layer) for layer, own in good for row in own], kernels))
    return [
        Propagation(layer, own, [next(updated) for _ in own]) if isinstance(own, list) else own
        for layer, own in zip(layers, rows, strict=True)
    ]


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
                scores - layer.shifts()[head],
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


def _updated(rows: Sequence[tuple[Row, Candidates]], kernels: Kernels | None) -> list[Updated | None]:
    """What the graph makes of each row. Rows of one sequential strength go together; the others are independent anyway."""
    updated: list[Updated | None] = [None] * len(rows)
    together: dict[float, list[int]] = {}
    for place, (row, layer) in enumerate(rows):
        graph = layer.plan.policy.graph
        if graph is None or not layer.plan.propagates or row.select == 0 or not _matters(row, layer):
            continue
        if graph.update == "sequential":
            together.setdefault(graph.strength, []).append(place)
        elif row.sources:
            updated[place] = (kernels or kernels_for(row.scores.device)).decay(row, graph)
    for strength, places in together.items():
        chosen = [rows[place][0] for place in places]
        found = (kernels or kernels_for(chosen[0].scores.device)).sequential(chosen, strength)
        for place, own in zip(places, found, strict=True):
            updated[place] = own
    return updated


def _matters(row: Row, layer: Candidates) -> bool:
    """Whether the row's updated scores are needed: not where it keeps all its candidates by itself, and nobody asks."""
    plan = layer.plan
    shared = plan.policy.budget_allocation == "adaptive_heads" or (plan.policy.is_coarse and not plan.votes)
    return row.size > row.select or shared or bool(plan.outputs)
