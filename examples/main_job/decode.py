"""Feeding a cache further: greedy answers, and the loss of a known continuation. Leaves the cache as it was."""

import copy
from typing import Any

import torch
from graphkv_client.integrations.transformers import cache_argument

ANSWER_TOKENS = 24


def fork(cache: Any) -> Any:
    """A cache that grows on its own. The tensors are shared: layers grow by concatenation, never in place."""
    grown = copy.copy(cache)
    grown.layers = [copy.copy(layer) for layer in cache.layers]
    return grown


def cache_bytes(cache: Any) -> int:
    """Of keys and values, all layers."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def answer(model: Any, cache: Any, question: torch.Tensor | None, first: torch.Tensor) -> list[int]:
    """The greedy answer, at most 24 tokens, without the end mark.

    question int64 [1, m] is fed first; None where it is in the cache already, and then `first`, the prefill's last
    logits [vocabulary], give the first token.
    """
    fed = {cache_argument(model): fork(cache)}
    logits = first if question is None else model(question, **fed, logits_to_keep=1).logits[0, -1]
    ids: list[int] = []
    while len(ids) < ANSWER_TOKENS:
        token = int(logits.argmax())
        if token == model.config.eos_token_id:
            break
        ids.append(token)
        logits = model(torch.tensor([[token]]), **fed, logits_to_keep=1).logits[0, -1]
    return ids


def loss(model: Any, cache: Any, given: torch.Tensor, continuation: torch.Tensor) -> float | None:
    """Nats a token of `continuation` int64 [1, c], after `given` int64 [1, g] has been fed.

    Without `given` its first token does not count: the uncut prefill predicts it. None where no token counts.
    """
    fed = torch.cat([given, continuation], dim=1)
    counted = continuation.shape[1] - (0 if given.shape[1] else 1)
    if counted < 1:
        return None
    logits = model(fed[:, :-1], **{cache_argument(model): fork(cache)}, logits_to_keep=counted).logits[0]
    picked = logits.log_softmax(dim=-1).gather(1, fed[0, -counted:, None])
    return float(-picked.mean())
