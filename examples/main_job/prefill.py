"""One prefill that feeds every policy's stream while it runs. The prompt is read once, so all see the same keys."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from graphkv_client import CompressClient, Policy, Selection
from graphkv_client.integrations.transformers import PrefilledLayer, PrefillStream, cache_argument, observe_prefill
from transformers import DynamicCache

from main_job.progress import Progress


@dataclass(frozen=True, slots=True)
class Chosen:
    """One policy's answer: the selection, the kept slots by layer, and how long after the prefill it was all there."""

    selection: Selection
    kept: dict[int, torch.Tensor]
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class Prefilled:
    """cache: the whole one. first: the logits [vocabulary] after the last token. chosen: by policy, in their order; None
    where the prompt is within the budget, so that all is kept.
    """

    cache: DynamicCache
    first: torch.Tensor
    chosen: list[Chosen | None]


class _Fan:
    """Hands each layer to every stream."""

    def __init__(self, streams: Sequence[PrefillStream], progress: Progress) -> None:
        self._streams = streams
        self._progress = progress
        self.begun = False
        self._layers = 0

    def wants(self, num_tokens: int) -> bool:
        return any(stream.wants(num_tokens) for stream in self._streams)

    def begin(self, layers: list[int], num_tokens: int) -> None:
        self.begun = True
        self._layers = len(layers)
        for stream in self._streams:
            stream.begin(layers, num_tokens)

    def layer(self, seen: PrefilledLayer) -> None:
        self._progress.note(f"prefilling, layer {seen.layer + 1} of {self._layers}")
        for stream in self._streams:
            stream.put(seen)

    def end(self, cache: DynamicCache) -> None:
        """Nothing: the answers are collected once the time of the prefill is known."""

    def abandon(self) -> None:
        for stream in self._streams:
            stream.close()


def prefill(model: Any, ids: torch.Tensor, client: CompressClient, policies: Sequence[Policy], progress: Progress) -> Prefilled:
    """Prefills ids int64 [1, n], streaming each layer under each policy, and waits for all answers."""
    streams = [PrefillStream(client, policy, model) for policy in policies]
    fan = _Fan(streams, progress)
    cache = DynamicCache(config=model.config)
    with ExitStack() as stack:
        stack.enter_context(observe_prefill(model, fan))
        with progress.step("prefill", f"prefilling {ids.shape[1]:,} tokens"):
            logits = model(ids, **{cache_argument(model): cache}, logits_to_keep=1).logits[0, -1]
        started = time.perf_counter()
        chosen: list[Chosen | None] = []
        for stream in streams:
            progress.note("waiting for the service's last layers")
            if not fan.begun:
                chosen.append(None)
                continue
            selection, kept = stream.collect()
            chosen.append(Chosen(selection, kept, time.perf_counter() - started))
    return Prefilled(cache, logits, chosen)
