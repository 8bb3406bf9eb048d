"""select(): score, keep always, narrow to candidates, propagate, keep the best; in the order of docs/algorithm.md.

`select` is the whole job in-process; the service calls `select_layers` with what arrived, so both give one answer. Where a
policy needs all layers, `allocate` comes before it or `finish` after it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphkv import outputs as requested
from graphkv.allocation import allocate
from graphkv.batches import Prompt, prompts_of
from graphkv.budgets import LayerPlan
from graphkv.candidates import Candidates, contended_tokens
from graphkv.granularity import Part, joined, part_of, settle
from graphkv.graph import Propagation, propagate
from graphkv.heads import base_choice, choice
from graphkv.kernels import Kernels
from graphkv.layer import Layer
from graphkv.narrowing import everyone, narrow, of_all_scores, score_layer
from graphkv.terms.errors import InvalidInputError
from graphkv.terms.policy import Policy
from graphkv.terms.rope import Rope
from graphkv.terms.selection import LayerSelection, Selection

__all__ = [
    "Chosen",
    "Part",
    "allocate",
    "finish",
    "narrow",
    "of_all_scores",
    "score_layer",
    "select",
    "select_layers",
    "select_prompt",
    "selection_of",
]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one layer keeps: int32 [Hkv, B] ascending token (or page) ids, or Hkv such rows where they differ in length.

    Where heads or layers share an answer, int32 [B]. outputs: by name, what the plan asked for besides.
    """

    indices: torch.Tensor | list[torch.Tensor]
    kept_score_ratio: float
    changed: int
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


def select(
    keys: Any,
    *,
    policy: Policy,
    queries: Any = None,
    attention: Any = None,
    scores: Any = None,
    values: Any = None,
    query_mean: Any = None,
    query_covariance: Any = None,
    similarity_keys: Any = None,
    positions: Any = None,
    pinned: Any = None,
    rope: Rope | None = None,
    layout: str = "HND",
    outputs: Sequence[str] = (),
) -> Selection | list[Selection]:
    """The tokens to keep, computed here, on the device the keys are on.

    Args:
        keys: post-RoPE keys of one prompt, [L, Hkv, n, d] or a sequence of L arrays [Hkv, n, d]; or a list of such
            prompts, in which case every other argument is a list too and so is the answer. numpy, torch or DLPack;
            float64, float32, float16, bfloat16 or float8.
        policy: which tokens to keep and how.
        queries: the last w tokens' queries, [L, Hq, w, d]; w is the policy's observation window.
        attention: instead, their attention to all tokens, [L, Hq, w, n].
        scores: instead, the caller's own scores, [L, Hkv, n]; -inf marks padding.
        values: the tokens' values, [L, Hkv, n, any]; only their norms are read (expected_attention).
        query_mean: the mean of queries to come, [L, Hq, d], rotated by `graphkv.rope.average_rope` (expected_attention).
        query_covariance: their covariance, [L, Hq, d, d], likewise.
        similarity_keys: what the graph compares instead of the keys, [L, Hkv, n, x] (similarity "pre_rope").
        positions: where the keys' tokens stood, [L, n] or [L, Hkv, n], default 0..n-1 (similarity "pre_rope").
        pinned: ranges (start, stop) of tokens that are always kept.
        rope: how the keys were rotated; needed by similarity "pre_rope".
        layout: "HND", or "NHD" where keys are [L, n, Hkv, d] and queries [L, w, Hq, d].
        outputs: what the answer shall hold besides the tokens: names from `graphkv.terms.catalogue.OUTPUTS`.

    Returns:
        A Selection; its indices are int32 [Hkv, B], ascending, of the caller's kind and on its device; see
        `LayerSelection` for answers that heads share, pages, and heads that differ.

    Raises:
        InvalidInputError: naming the argument, what was given and what is allowed.
    """
    inputs = {
        "keys": keys,
        "queries": queries,
        "attention": attention,
        "scores": scores,
        "values": values,
        "query_mean": query_mean,
        "query_covariance": query_covariance,
        "similarity_keys": similarity_keys,
        "positions": positions,
    }
    prompts, batched = prompts_of(inputs, policy=policy, pinned=pinned, rope=rope, layout=layout, outputs=outputs)
    answers: list[Sequence[Chosen | Part | InvalidInputError]]
    if policy.needs_all_layers:
        answers = [select_prompt(prompt.layers) for prompt in prompts]
    else:
        layers = iter(select_layers([layer for prompt in prompts for layer in prompt.layers]))
        answers = [[next(layers) for _ in prompt.layers] for prompt in prompts]
    selections = [_selection(index, *both) for index, both in enumerate(zip(prompts, answers, strict=True))]
    return selections if batched else selections[0]


def select_layers(
    work: Sequence[Layer | Candidates], *, kernels: Kernels | None = None
) -> list[Chosen | Part | InvalidInputError]:
    """One batch of layers, of any prompts and policies, on one device; an error is the answer of its own layer alone.

    Where all layers of a prompt share one answer, a layer's is a Part, for `finish`. A row's answer never depends on what
    else is in the batch.
    """
    ready: list[Candidates] = []
    failed: dict[int, InvalidInputError] = {}
    for place, item in enumerate(work):
        if not item.plan.allocated:
            raise RuntimeError("a layer whose budget waits for all layers came without them: see allocate")
        try:
            if isinstance(item, Layer):
                ready.append(_prepared(item, kernels))
                continue
            if not item.indexed:
                item.check()
            ready.append(item)
        except InvalidInputError as error:
            failed[place] = error
    propagated = iter(propagate(ready, kernels))
    answers: list[Chosen | Part | InvalidInputError] = []
    for place in range(len(work)):
        outcome = failed[place] if place in failed else next(propagated)
        answers.append(outcome if isinstance(outcome, InvalidInputError) else _answer(outcome, kernels))
    return answers


def finish(parts: Sequence[Part]) -> Chosen:
    """The one answer of all layers of a prompt: their parts, in the order of layers."""
    return _shared(joined(parts), None)


def select_prompt(layers: Sequence[Layer]) -> Sequence[Chosen | InvalidInputError]:
    """The answers of one prompt, whatever its policy needs: one a layer, in order, or one alone where they share it.

    Where they share it and some of them are wrong, the errors alone. Raises InvalidInputError as `allocate` does.
    """
    answers = select_layers(allocate(layers))
    parts = [answer for answer in answers if isinstance(answer, Part)]
    if parts and len(parts) == len(answers):
        return [finish(parts)]
    return [answer for answer in answers if not isinstance(answer, Part)]


def _prepared(layer: Layer, kernels: Kernels | None = None) -> Candidates:
    """The layer's candidates: gathered where the policy narrows, otherwise pointing into the layer."""
    return everyone(layer, kernels) if layer.plan.candidates is None else narrow(layer, kernels)


def _answer(layer: Propagation, kernels: Kernels | None) -> Chosen | Part:
    policy, heads = layer.layer.plan.policy, range(layer.layer.kv_heads)
    if policy.granularity == "model":
        return part_of(layer, heads, kernels)
    if policy.granularity == "layer":
        return _shared(part_of(layer, heads, kernels), kernels)
    if policy.page_size is not None:
        return _paged(layer, kernels)
    return _by_heads(layer, kernels)


def _by_heads(layer: Propagation, kernels: Kernels | None) -> Chosen:
    """Every KV head keeps the tokens it picked, and the always-kept ones."""
    candidates, plan = layer.layer, layer.layer.plan
    picked = choice(layer, kernels)
    slots = torch.zeros(candidates.ids.shape, dtype=torch.bool, device=candidates.ids.device)
    for place, mask in zip(slots, picked, strict=True):
        place[: mask.shape[0]] = mask
    ids = torch.where(slots, candidates.ids, plan.num_tokens).to(torch.int64)  # one spare place for what is not kept
    keep = torch.zeros(candidates.kv_heads, plan.num_tokens + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
    keep = keep[:, : plan.num_tokens].logical_or_(~contended_tokens(plan, ids.device))
    shifts, facts = candidates.shifts(), candidates.facts
    kept = (candidates.scores.to(torch.float64) - shifts[:, None]).masked_fill_(~slots, 0.0).sum(dim=1)
    mass, total = torch.stack([kept.sum(), (facts[:, 0] - shifts * facts[:, 2]).sum()]).tolist()
    changed = torch.zeros((), dtype=torch.int64, device=ids.device)
    if plan.propagates:
        for mask, base in zip(picked, base_choice(layer, kernels), strict=True):
            changed += (mask & ~base).sum()
    return Chosen(_rows(keep), _share(mass, total), int(changed), requested.of_heads(layer, keep))


def _paged(layer: Propagation, kernels: Kernels | None) -> Chosen:
    """Every KV head keeps pages of its own."""
    settled, total = [], 0.0
    for head in range(layer.layer.kv_heads):  # a part at a time: each is a few arrays of all tokens
        part = part_of(layer, [head], kernels)
        settled.append(settle(part, kernels))
        total += part.total
    pages = torch.stack([own.pages for own in settled if own.pages is not None])
    ratio = _share(sum(own.kept_mass for own in settled), total)
    kept = torch.stack([own.kept for own in settled])
    return Chosen(_rows(pages), ratio, sum(own.changed for own in settled), requested.of_heads(layer, kept))


def _shared(part: Part, kernels: Kernels | None) -> Chosen:
    """All rows of a part keep the same tokens or pages."""
    settled = settle(part, kernels)
    chosen = settled.kept if settled.pages is None else settled.pages
    ratio = _share(settled.kept_mass, part.total)
    return Chosen(_ids(chosen), ratio, settled.changed, requested.shared(part, settled.kept))


def _share(kept: float, total: float) -> float:
    """kept_score_ratio; 1 where there is nothing to share."""
    return min(1.0, kept / total) if total > 0.0 else 1.0


def _rows(kept: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
    """int32 [Hkv, B] ids of what bool [Hkv, n or pages] marks, or a list of rows where they differ in length."""
    rows = [_ids(head) for head in kept]  # head by head: nonzero gives int64
    return torch.stack(rows) if len({row.shape[0] for row in rows}) == 1 else rows


def _ids(kept: torch.Tensor) -> torch.Tensor:
    return kept.nonzero()[:, 0].to(torch.int32)


def selection_of(chosen: Chosen, plan: LayerPlan, prompt: int, convert: Callable[[torch.Tensor], Any]) -> LayerSelection:
    """A layer's answer for its caller: `convert` turns a tensor into an array of the caller's kind."""
    indices = chosen.indices
    return LayerSelection(
        layer=plan.layer,
        indices=[convert(row) for row in indices] if isinstance(indices, list) else convert(indices),
        num_tokens=plan.num_tokens,
        kept_score_ratio=chosen.kept_score_ratio,
        changed=chosen.changed,
        importance="scores" if plan.caller_scores else plan.policy.scorer,
        fingerprint=plan.policy.fingerprint,
        prompt=prompt,
        granularity=plan.policy.granularity,
        page_size=plan.policy.page_size,
        outputs={name: convert(chosen.outputs[name]) for name in plan.outputs},
    )


def _selection(index: int, prompt: Prompt, answers: Sequence[Chosen | Part | InvalidInputError]) -> Selection:
    layers = []
    for layer, answer in zip(prompt.layers, answers, strict=False):  # one answer for all, where they share it
        if isinstance(answer, InvalidInputError):
            raise answer
        if isinstance(answer, Part):
            raise TypeError("a part of an answer was taken for one")
        layers.append(selection_of(answer, layer.plan, index, prompt.answer))
    return Selection(tuple(layers))
