"""select(): score, keep always, narrow to candidates, propagate, keep the best; in the order of docs/algorithm.md.

`select` is the whole job in-process; the service calls `select_layers` with what arrived, so both give one answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphkv.batches import Prompt, prompts_of
from graphkv.candidates import Candidates
from graphkv.graph import Picked, pick
from graphkv.kernels import Kernels
from graphkv.layer import Layer
from graphkv.narrowing import everyone, narrow, score_layer
from graphkv.terms.errors import InvalidInputError
from graphkv.terms.policy import Policy
from graphkv.terms.rope import Rope
from graphkv.terms.selection import LayerSelection, Selection

__all__ = ["Chosen", "narrow", "score_layer", "select", "select_layers"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one layer keeps: int32 [Hkv, B] ascending token ids, or Hkv such rows where they differ in length."""

    indices: torch.Tensor | list[torch.Tensor]
    kept_score_ratio: float
    changed: int


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

    Returns:
        A Selection; its indices are int32 [Hkv, B], ascending, of the caller's kind and on its device.

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
    prompts, batched = prompts_of(inputs, policy=policy, pinned=pinned, rope=rope, layout=layout)
    answers = iter(select_layers([layer for prompt in prompts for layer in prompt.layers]))
    selections = [_selection(index, prompt, [next(answers) for _ in prompt.layers]) for index, prompt in enumerate(prompts)]
    return selections if batched else selections[0]


def select_layers(work: Sequence[Layer | Candidates], *, kernels: Kernels | None = None) -> list[Chosen | InvalidInputError]:
    """One batch of layers, of any prompts and policies, on one device; an error is the answer of its own layer alone.

    A row's answer never depends on what else is in the batch.
    """
    answers: list[Chosen | InvalidInputError] = []
    ready: list[Candidates] = []
    failed: dict[int, InvalidInputError] = {}
    for place, item in enumerate(work):
        try:
            if isinstance(item, Layer):
                ready.append(_prepared(item, kernels))
                continue
            if not item.indexed:
                item.check()
            ready.append(item)
        except InvalidInputError as error:
            failed[place] = error
    picked = iter(pick(ready, kernels))
    ready_again = iter(ready)
    for place in range(len(work)):
        if place in failed:
            answers.append(failed[place])
            continue
        layer, outcome = next(ready_again), next(picked)
        answers.append(outcome if isinstance(outcome, InvalidInputError) else _chosen(layer, outcome))
    return answers


def _prepared(layer: Layer, kernels: Kernels | None = None) -> Candidates:
    """The layer's candidates: gathered where the policy narrows, otherwise pointing into the layer."""
    return everyone(layer, kernels) if layer.plan.candidates is None else narrow(layer, kernels)


def _chosen(layer: Candidates, picked: Picked) -> Chosen:
    """The picked contenders and the always-kept tokens, together and ascending."""
    plan = layer.plan
    if plan.keeps_all:
        everything = torch.arange(plan.num_tokens, dtype=torch.int32, device=layer.ids.device)
        return Chosen(everything.expand(layer.kv_heads, -1), picked.kept_score_ratio, picked.changed)
    keep = torch.zeros(layer.kv_heads, plan.num_tokens + 1, dtype=torch.bool, device=layer.ids.device)
    ids = torch.where(picked.kept, layer.ids, plan.num_tokens).to(torch.int64)  # one spare place for what is not kept
    keep.scatter_(1, ids, True)
    keep = keep[:, : plan.num_tokens]
    for start, stop in plan.always:
        keep[:, start:stop] = True
    rows = [head.nonzero()[:, 0].to(torch.int32) for head in keep]  # head by head: nonzero gives int64
    even = len({row.shape[0] for row in rows}) == 1
    return Chosen(torch.stack(rows) if even else rows, picked.kept_score_ratio, picked.changed)


def _selection(index: int, prompt: Prompt, answers: list[Chosen | InvalidInputError]) -> Selection:
    layers = []
    for layer, answer in zip(prompt.layers, answers, strict=True):
        if isinstance(answer, InvalidInputError):
            raise answer
        layers.append(
            LayerSelection(
                layer=layer.plan.layer,
                indices=prompt.answer(answer.indices),
                num_tokens=layer.plan.num_tokens,
                kept_score_ratio=answer.kept_score_ratio,
                changed=answer.changed,
                importance="scores" if layer.plan.caller_scores else layer.plan.policy.scorer,
                fingerprint=layer.plan.policy.fingerprint,
                prompt=index,
            )
        )
    return Selection(tuple(layers))
