"""From a whole layer to its candidates: scores, the always-kept left out, the best C of each KV head gathered."""

import math

import torch

from graphkv.budgets import LayerPlan
from graphkv.candidates import Candidates, contended_tokens
from graphkv.finite import check_finite, check_scores
from graphkv.kernels import Kernels, kernels_for
from graphkv.layer import Layer
from graphkv.scorers import scorer
from graphkv.terms.errors import Reason, invalid
from graphkv.terms.rope import Rope

__all__ = ["everyone", "narrow", "of_all_scores", "score_layer"]


def score_layer(layer: Layer, kernels: Kernels | None = None) -> torch.Tensor:
    """float32 [Hkv, n] on the keys' device: the base scores, checked; always-kept tokens hold 0.

    Raises InvalidInputError (NON_FINITE) naming layer, head and token where a key, query or score that is read is NaN
    or infinite; a score of -inf is padding.
    """
    plan = layer.plan
    scores = torch.zeros(layer.kv_heads, plan.num_tokens, dtype=torch.float32, device=layer.keys.device)
    if plan.keeps_all:
        return scores
    kernels = kernels or kernels_for(layer.keys.device)
    name = "given" if layer.scores is not None else plan.policy.scorer
    computed = scorer(name)(layer, kernels)
    scores[:, : computed.shape[1]] = computed
    competes = contended_tokens(plan, scores.device)
    check_scores(scores, competes, plan.layer)
    return scores.masked_fill_(~competes, 0.0).add_(0.0)  # -0.0 becomes 0.0: they are equal, and sort alike


def narrow(layer: Layer, kernels: Kernels | None = None) -> Candidates:
    """The layer's candidates, gathered: what travels, and what the answer needs. See Candidates for the shapes."""
    plan = layer.plan
    kernels = kernels or kernels_for(layer.keys.device)
    scores = _contenders(layer, kernels)
    ids, best = _packed(scores, kernels.top_tokens(scores, plan.candidate_width), plan.candidate_width)
    keys = similar = None
    if plan.needs_keys and layer.similarity_keys is None:
        keys = _gathered(layer.keys, ids)
    elif plan.needs_keys and layer.similarity_keys is not None:
        similar = _gathered(layer.similarity_keys, ids)
    positions = None if layer.positions is None or similar is not None else _positions(layer, ids)
    every = scores if plan.needs_all_scores else None
    return Candidates(plan, ids, best, _facts(scores), keys, similar, positions, layer.rope, all_scores=every)


def everyone(layer: Layer, kernels: Kernels | None = None) -> Candidates:
    """All contenders as candidates, pointing into the layer: nothing is gathered."""
    plan = layer.plan
    scores = _contenders(layer, kernels)
    ids, best = _packed(scores, scores > -math.inf, plan.candidate_width)
    positions = layer.positions
    if positions is not None and positions.ndim == 1:
        positions = positions.expand(layer.kv_heads, -1)
    return Candidates(
        plan,
        ids,
        best,
        _facts(scores),
        layer.keys,
        layer.similarity_keys,
        positions,
        layer.rope,
        indexed=True,
        all_scores=scores if plan.needs_all_scores else None,
    )


def of_all_scores(
    plan: LayerPlan,
    all_scores: torch.Tensor,
    *,
    ids: torch.Tensor,
    keys: torch.Tensor | None = None,
    similarity_keys: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    rope: Rope | None = None,
) -> Candidates:
    """Candidates that came with the scores of all tokens, float32 [Hkv, n]: their own scores and the facts follow from them.

    Raises InvalidInputError where a contender's score is NaN or +infinity, or an id is no token; `Candidates.check` the rest.
    """
    competes = contended_tokens(plan, all_scores.device)
    check_scores(all_scores, competes, plan.layer)
    scores = all_scores.masked_fill(~competes, -math.inf).add_(0.0)
    places = ids.to(torch.int64)
    if bool((places >= plan.num_tokens).any()):
        raise invalid("candidate_ids", int(places.max()), f"below {plan.num_tokens}, the tokens", reason=Reason.BAD_SHAPE)
    best = scores.gather(1, places.clamp(min=0)).masked_fill_(places < 0, -math.inf)
    return Candidates(plan, ids, best, _facts(scores), keys, similarity_keys, positions, rope, all_scores=scores)


def _contenders(layer: Layer, kernels: Kernels | None) -> torch.Tensor:
    """float32 [Hkv, n]: base scores; -inf where a token does not compete."""
    scores = score_layer(layer, kernels)
    return scores.masked_fill_(~contended_tokens(layer.plan, scores.device), -math.inf)


def _facts(scores: torch.Tensor) -> torch.Tensor:
    """float64 [Hkv, 3]: sum, smallest and number of the contenders' scores."""
    competes = scores > -math.inf
    number = competes.sum(dim=1)
    total = scores.masked_fill(~competes, 0.0).sum(dim=1, dtype=torch.float64)
    smallest = scores.masked_fill(~competes, math.inf)
    least = smallest.amin(dim=1) if scores.shape[1] else torch.zeros_like(total)
    least = torch.where(number > 0, least.to(torch.float64), 0.0)
    return torch.stack([total, least, number.to(torch.float64)], dim=1)


def _packed(scores: torch.Tensor, taken: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The taken tokens' ids, int32 [Hkv, width] ascending, then -1, and their scores, then -inf."""
    ids = torch.full((scores.shape[0], width), -1, dtype=torch.int32, device=scores.device)
    best = torch.full((scores.shape[0], width), -math.inf, dtype=torch.float32, device=scores.device)
    for head in range(scores.shape[0]):
        tokens = taken[head].nonzero()[:, 0]
        ids[head, : tokens.shape[0]] = tokens.to(torch.int32)
        best[head, : tokens.shape[0]] = scores[head, tokens]
    return ids, best


def _gathered(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[Hkv, W, d]: the candidates' keys, in their own dtype; zero in padding slots."""
    raw = keys.view(torch.uint8) if keys.dtype.itemsize == 1 else keys  # float8 can only be moved as bytes
    places = ids.clamp(min=0).to(torch.int64)
    taken = torch.stack([head.index_select(0, place) for head, place in zip(raw, places, strict=True)])
    padding = ids < 0
    if bool(padding.any()):
        taken.masked_fill_(padding[..., None], 0)
    return taken.view(keys.dtype)


def _positions(layer: Layer, ids: torch.Tensor) -> torch.Tensor:
    """int64 [Hkv, W]: where the candidates stood; 0 in padding slots."""
    if layer.positions is None:
        raise TypeError("positions were not given")
    positions = layer.positions.to(torch.int64)
    if positions.ndim == 1:
        positions = positions.expand(layer.kv_heads, -1)
    return positions.gather(1, ids.clamp(min=0).to(torch.int64)).masked_fill_(ids < 0, 0)


def check_candidate_keys(candidates: Candidates) -> None:
    """Raises InvalidInputError (NON_FINITE) where a key that the graph will read is NaN or infinite."""
    role = "keys" if candidates.similarity_keys is None else "similarity_keys"
    keys = candidates.keys if candidates.similarity_keys is None else candidates.similarity_keys
    if keys is None:
        return
    if not candidates.indexed:
        check_finite(role, keys, candidates.plan.layer, ids=candidates.ids)
        return
    for head, count in enumerate(candidates.counts()):
        ids = candidates.ids[head, :count].to(torch.int64)
        check_finite(role, keys[head].index_select(0, ids)[None], candidates.plan.layer, ids=ids[None], first_head=head)
