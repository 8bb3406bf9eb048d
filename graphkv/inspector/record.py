"""All that happens to one prompt under one policy: scores, candidates, sources, whom they changed, what is kept.

Runs the library's own selection, head by head, with kernels that remember what they were asked and what they answered; so
nothing here decides anything. Knows no page.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from graphkv.algorithm import Chosen, select_layers
from graphkv.allocation import allocate
from graphkv.batches import prompts_of
from graphkv.candidates import Candidates, contended_tokens
from graphkv.graph import propagate
from graphkv.kernels import Kernels, kernels_for
from graphkv.kernels.decay.chunked import SAME, edges_of_sources
from graphkv.kernels.products import products
from graphkv.layer import Layer
from graphkv.narrowing import everyone, narrow, score_layer
from graphkv.rows import Row, Updated
from graphkv.terms.always_kept import Range
from graphkv.terms.errors import InvalidInputError, Reason, invalid
from graphkv.terms.policy import Graph, Policy
from graphkv.terms.rope import Rope

__all__ = ["MOST_NEIGHBORS", "LayerRecord", "Neighbors", "PolicyRecord", "RowRecord", "record"]

_ALLOWED = {"granularity": '"head"', "page_size": "None"}
MOST_NEIGHBORS = 24  # remembered of each source, the most similar first

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Neighbors:
    """Whom each of K sources changed. counts int32 [K]: how many tokens. tokens int32 [K, M], similarity float32 [K, M]:
    the most similar of them, best first; token -1 where there are fewer than M.
    """

    counts: Ints
    tokens: Ints
    similarity: Floats


@dataclass(frozen=True, slots=True)
class RowRecord:
    """One KV head of one layer.

    scores float32 [n]: base scores; NaN where a token is always kept. shift: what step 1 subtracts from them (<= 0).
    candidates int32 [C], best first. updated float32 [C]: their scores after propagation; sequential: at the moment
    each was kept, at the end for the rest; evict: -1 - rank. factors float32 [C]: what multiplied the shifted base score,
    NaN for an evicted token. sources int32 [K]: best first; sequential: all kept contenders, in the order of choice, or
    none where all candidates are kept anyway. kept bool [n].
    """

    scores: Floats
    shift: float
    candidates: Ints
    updated: Floats
    factors: Floats
    sources: Ints
    neighbors: Neighbors
    kept: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One layer: its budget B, the always-kept ranges, the share of the score kept, the tokens the graph changed, its rows."""

    budget: int
    always: tuple[Range, ...]
    kept_score_ratio: float
    changed: int
    rows: tuple[RowRecord, ...]


@dataclass(frozen=True, slots=True)
class PolicyRecord:
    """One prompt of `num_tokens` under one policy."""

    name: str
    policy: Policy
    num_tokens: int
    layers: tuple[LayerRecord, ...]

    @property
    def rows(self) -> list[RowRecord]:
        """All rows, layer by layer, head by head."""
        return [row for layer in self.layers for row in layer.rows]


def record(
    keys: Any,
    *,
    policy: Policy,
    name: str | None = None,
    pinned: Sequence[Range] | None = None,
    rope: Rope | None = None,
    **inputs: Any,
) -> PolicyRecord:
    """What `graphkv.select` does with one prompt: its arguments (`inputs`: queries, attention, scores and so on), without a
    layout, and `name` for the page (default: the policy's fingerprint).

    Raises InvalidInputError as `graphkv.select` does, and for a batch of prompts.
    """
    prompts, batched = prompts_of({"keys": keys, **inputs}, policy=policy, pinned=pinned, rope=rope, layout="HND")
    if batched:
        raise invalid("keys", f"{len(prompts)} prompts", "one prompt", reason=Reason.BAD_SHAPE)
    if policy.is_coarse:
        field = "granularity" if policy.granularity != "head" else "page_size"
        allowed = f"{_ALLOWED[field]}: the page shows each KV head's own tokens"
        raise invalid(field, getattr(policy, field), allowed)
    layers = allocate(prompts[0].layers)
    records = tuple(_layer(layer) for layer in layers)
    return PolicyRecord(name or policy.fingerprint, policy, layers[0].plan.num_tokens, records)


def _layer(layer: Layer) -> LayerRecord:
    plan = layer.plan
    candidates = everyone(layer) if plan.candidates is None else narrow(layer)
    [chosen] = select_layers([candidates])
    if not isinstance(chosen, Chosen):
        raise chosen if isinstance(chosen, InvalidInputError) else TypeError("a part of an answer was taken for one")
    scores = score_layer(layer).masked_fill_(~contended_tokens(plan, layer.keys.device), torch.nan).cpu().numpy()
    rows = []
    for head in range(layer.kv_heads):
        kept = np.zeros(plan.num_tokens, dtype=np.bool_)
        kept[chosen.indices[head].cpu().numpy()] = True
        rows.append(_row(_head(candidates, head), scores[head], kept))
    return LayerRecord(plan.budget, plan.always, chosen.kept_score_ratio, chosen.changed, tuple(rows))


def _head(layer: Candidates, head: int) -> Candidates:
    """The candidates of one KV head as a layer of its own: a row's answer depends on no other."""
    own = slice(head, head + 1)
    names = ("ids", "scores", "facts", "keys", "similarity_keys", "positions", "all_scores")
    tensors = {name: tensor[own] for name in names if (tensor := getattr(layer, name)) is not None}
    return dataclasses.replace(layer, **tensors)


def _row(head: Candidates, scores: Floats, kept: npt.NDArray[np.bool_]) -> RowRecord:
    [size] = head.counts()
    base = head.scores[0, :size].to(torch.float64)
    shift = float(head.facts[0, 1].clamp(max=0.0)) if head.plan.propagates else 0.0
    ids = head.ids[0, :size].to(torch.int64)
    best_first = torch.sort(base, descending=True, stable=True).indices
    seen = _Propagation(head)
    return RowRecord(
        scores=scores,
        shift=shift,
        candidates=_ints(ids[best_first]),
        updated=_floats(seen.updated[best_first]),
        factors=_floats(seen.factors[best_first]),
        sources=_ints(ids[seen.sources]),
        neighbors=_neighbors(seen.edges, ids),
        kept=kept,
    )


class _Propagation:
    """What the graph did in one row, over its candidates' slots in token order.

    updated, factors float64 [C]; sources int64 [K] slots; edges float32 [K, C]: each source's similarity to whom it
    changed, 0 elsewhere.
    """

    def __init__(self, head: Candidates) -> None:
        [size] = head.counts()
        device = head.ids.device
        self._own = kernels_for(device)
        self.updated = head.scores[0, :size].to(torch.float64)
        self.factors = torch.ones(size, dtype=torch.float64, device=device)
        self.sources = torch.empty(0, dtype=torch.int64, device=device)
        self.edges = torch.empty(0, size, dtype=torch.float32, device=device)
        [propagated] = propagate([head], self._kernels())
        if isinstance(propagated, InvalidInputError):
            raise propagated

    def _kernels(self) -> Kernels:
        return dataclasses.replace(self._own, decay=self._decay, sequential=self._sequential)

    def _decay(self, row: Row, graph: Graph) -> Updated:
        updated = self._own.decay(row, graph)
        self.sources = torch.sort(row.scores, descending=True, stable=True).indices[: row.sources]
        unit = row.unit_keys()
        is_source = torch.zeros(row.size, dtype=torch.bool, device=unit.device).index_fill_(0, self.sources, True)
        self.edges = edges_of_sources(unit[self.sources], unit, is_source, row.neighbors, graph.threshold)
        self.updated, self.factors = updated.scores, updated.factors
        if graph.signal == "evict":
            self.factors = self.factors.masked_fill((self.edges > 0.0).any(dim=0), torch.nan)
        return updated

    def _sequential(self, rows: Sequence[Row], strength: float) -> list[Updated]:
        found = self._own.sequential(rows, strength)
        [row], [updated] = rows, found
        if updated.order is None:
            raise TypeError("sequential propagation without an order of choice")
        order, unit = updated.order, row.unit_keys()
        edges = products(unit[order], unit).clamp_(0.0, 1.0)
        edges.masked_fill_(edges >= SAME, 1.0)
        steps = torch.arange(order.shape[0], device=order.device)
        kept_at = torch.full((row.size,), order.shape[0], device=order.device).index_copy_(0, order, steps)
        edges.masked_fill_(kept_at <= steps[:, None], 0.0)  # what is kept already is past changing
        self.updated, self.factors, self.sources, self.edges = updated.scores, updated.factors, order, edges
        return found


def _neighbors(edges: torch.Tensor, ids: torch.Tensor) -> Neighbors:
    """The most similar tokens of each source; `edges` [K, C] are 0 where a source changed nothing."""
    top = torch.topk(edges, min(MOST_NEIGHBORS, edges.shape[1]), dim=1)
    tokens = torch.where(top.values > 0.0, ids[top.indices], -1)
    return Neighbors(_ints((edges > 0.0).sum(dim=1)), _ints(tokens), _floats(top.values))


def _ints(tensor: torch.Tensor) -> Ints:
    return tensor.to(device="cpu", dtype=torch.int32).numpy()


def _floats(tensor: torch.Tensor) -> Floats:
    return tensor.to(device="cpu", dtype=torch.float32).numpy()
