"""Step 7 where every KV head keeps candidates of its own: B_sel each, or shares of the layer's after "adaptive_heads"."""

import math

import torch

from graphkv.graph import Propagation
from graphkv.kernels import Kernels, kernels_for
from graphkv.rows import Row, Updated

__all__ = ["base_choice", "best_first", "choice", "own_choice"]


def choice(layer: Propagation, kernels: Kernels | None = None) -> list[torch.Tensor]:
    """bool [C] a row: the candidates kept."""
    if layer.layer.plan.policy.budget_allocation != "adaptive_heads":
        return [own_choice(row, updated, kernels) for row, updated in zip(layer.rows, layer.updated, strict=True)]
    pairs = zip(layer.rows, layer.updated, strict=True)
    return _shared([row.scores if updated is None else updated.comparable for row, updated in pairs], layer)


def base_choice(layer: Propagation, kernels: Kernels | None = None) -> list[torch.Tensor]:
    """bool [C] a row: those of the candidates that the same policy without a graph keeps."""
    candidates = layer.layer
    if candidates.plan.policy.budget_allocation != "adaptive_heads" or candidates.all_scores is None:
        return [own_choice(row, None, kernels) for row in layer.rows]
    everyone = candidates.all_scores.to(torch.float64)
    contenders = [(own > -math.inf).nonzero()[:, 0] for own in everyone]
    kept = _shared([own[places] for own, places in zip(everyone, contenders, strict=True)], layer)
    masks = []
    for head, row in enumerate(layer.rows):
        tokens = torch.zeros(candidates.plan.num_tokens, dtype=torch.bool, device=everyone.device)
        tokens[contenders[head][kept[head]]] = True
        masks.append(tokens[candidates.ids[head, : row.size].to(torch.int64)])
    return masks


def own_choice(row: Row, updated: Updated | None, kernels: Kernels | None = None) -> torch.Tensor:
    """bool [C]: the B_sel candidates a row keeps when it shares with no other."""
    if row.size == row.select:
        return torch.ones(row.size, dtype=torch.bool, device=row.scores.device)
    if updated is not None and updated.order is not None:
        return torch.zeros(row.size, dtype=torch.bool, device=row.scores.device).index_fill_(0, updated.order, True)
    values = row.scores if updated is None else updated.scores
    return (kernels or kernels_for(values.device)).top_tokens(values[None], row.select)[0]


def best_first(values: torch.Tensor) -> torch.Tensor:
    """int64 [C]: places by value descending, then by place."""
    return torch.sort(values, descending=True, stable=True).indices


def _shared(values: list[torch.Tensor], layer: Propagation) -> list[torch.Tensor]:
    """AdaKV (arXiv:2407.11550): in each row its best alpha * B - A are safe; the rest of what the layer keeps goes to the
    best of all rows together, ties to the lower head, then the lower token.
    """
    plan = layer.layer.plan
    safe = max(0, math.floor(plan.policy.option("alpha") * plan.budget + 1e-9) - plan.always_count)
    kept = [torch.zeros(own.shape, dtype=torch.bool, device=own.device) for own in values]
    for mask, own in zip(kept, values, strict=True):
        mask[best_first(own)[: min(safe, plan.contended)]] = True
    taken = torch.cat(kept)
    left = len(values) * plan.contended - int(taken.sum())
    others = (~taken).nonzero()[:, 0]
    taken[others[best_first(torch.cat(values)[others])[:left]]] = True
    return list(taken.split([own.shape[0] for own in values]))
