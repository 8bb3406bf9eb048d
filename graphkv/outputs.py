"""What an answer holds besides the tokens, on request; names and meanings in `graphkv.terms.catalogue.OUTPUTS`."""

import math
from collections.abc import Sequence

import torch

from graphkv.candidates import contended_tokens
from graphkv.granularity import Part
from graphkv.graph import Propagation
from graphkv.heads import best_first

__all__ = ["of_heads", "shared"]

Outputs = dict[str, torch.Tensor]


def of_heads(layer: Propagation, kept: torch.Tensor) -> Outputs:
    """Of a layer whose KV heads keep tokens (or pages) of their own; kept bool [Hkv, n], in tokens."""
    plan = layer.layer.plan
    found = _of_tokens(plan.outputs, kept)
    if "updated_scores" in plan.outputs:
        found["updated_scores"] = _updated_scores(layer)
    if "decay_factors" in plan.outputs:
        found["decay_factors"] = _decay_factors(layer)
    if "choice_order" in plan.outputs:
        found["choice_order"] = _choice_order(layer)
    return found


def shared(part: Part, kept: torch.Tensor) -> Outputs:
    """Of an answer that rows share; kept bool [n]. What is a row of `of_heads` is the only one here, without its axis."""
    found = {name: own if name in _RANGES else own[0] for name, own in _of_tokens(part.plan.outputs, kept[None]).items()}
    if "updated_scores" in part.plan.outputs:
        value = _to_float32(part.combined(part.value))
        found["updated_scores"] = value.masked_fill_(~contended_tokens(part.plan, value.device), math.inf)
    return found


_RANGES = ("dropped_ranges", "moves")


def _of_tokens(names: Sequence[str], kept: torch.Tensor) -> Outputs:
    """Those that follow from the kept tokens, bool [rows, n]."""
    found: Outputs = {}
    if "keep_mask" in names:
        found["keep_mask"] = kept
    if "dropped_ranges" in names:
        edge = kept.new_ones(kept.shape[0], 1)
        fenced = torch.cat([edge, kept, edge], dim=1)
        starts = (fenced[:, :-1] & ~fenced[:, 1:]).nonzero()
        stops = (~fenced[:, :-1] & fenced[:, 1:]).nonzero()
        found["dropped_ranges"] = torch.cat([starts, stops[:, 1:]], dim=1).to(torch.int32)
    if "moves" in names:
        places = kept.nonzero()
        destinations = kept.cumsum(dim=1, dtype=torch.int64)[kept] - 1
        moves = torch.cat([places, destinations[:, None]], dim=1)
        found["moves"] = moves[moves[:, 1] != moves[:, 2]].to(torch.int32)
    return found


def _updated_scores(layer: Propagation) -> torch.Tensor:
    candidates, plan = layer.layer, layer.layer.plan
    device = candidates.ids.device
    always = ~contended_tokens(plan, device)
    if candidates.all_scores is None:  # all tokens are kept
        return torch.full((candidates.kv_heads, plan.num_tokens), math.inf, dtype=torch.float32, device=device)
    scores = candidates.all_scores.to(torch.float64)
    if plan.propagates:
        scores = scores - candidates.shifts()[:, None]
    for head, row in enumerate(layer.rows):
        scores[head, candidates.ids[head, : row.size].to(torch.int64)] = layer.values(head)
    return _to_float32(scores).masked_fill_(always, math.inf)


def _to_float32(values: torch.Tensor) -> torch.Tensor:
    """Scores beyond float32's largest are that number: infinite ones say that a token is always kept, or padding."""
    most = torch.finfo(torch.float32).max
    return values.clamp(-most, most).to(torch.float32).masked_fill_(values == -math.inf, -math.inf)


def _decay_factors(layer: Propagation) -> torch.Tensor:
    candidates = layer.layer
    shape = (candidates.kv_heads, candidates.plan.num_tokens)
    factors = torch.ones(shape, dtype=torch.float32, device=candidates.ids.device)
    for head, (row, updated) in enumerate(zip(layer.rows, layer.updated, strict=True)):
        if updated is not None:
            factors[head, candidates.ids[head, : row.size].to(torch.int64)] = updated.factors.to(torch.float32)
    return factors


def _choice_order(layer: Propagation) -> torch.Tensor:
    candidates, plan = layer.layer, layer.layer.plan
    shape = (candidates.kv_heads, plan.contended)
    chosen = torch.full(shape, -1, dtype=torch.int32, device=candidates.ids.device)
    for head, (row, updated) in enumerate(zip(layer.rows, layer.updated, strict=True)):
        order = best_first(row.scores)[: row.select] if updated is None or updated.order is None else updated.order
        chosen[head, : row.select] = candidates.ids[head, : row.size][order]
    return chosen
