"""What a transformers model computes for one prompt: each layer's keys, and the queries of its last tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel

from graphkv_client.integrations._hf_prefill import PrefilledLayer, observe_prefill

__all__ = ["Activations", "activations", "texts_of"]


@dataclass(slots=True)
class Activations:
    """By layer, post-RoPE, in the model's dtype: keys [Hkv, n, d], and queries [Hq, w, d] of the last w tokens.

    layers: the model's own numbers of them; layers with a sliding window are left out.
    """

    layers: list[int] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)


def activations(model: PreTrainedModel, ids: Sequence[int], window: int) -> Activations:
    """One prefill of the tokens `ids`, of which the last `window` ones' queries are kept."""
    recorder = _Recorder(window)
    with torch.inference_mode(), observe_prefill(model, recorder):
        model(torch.tensor([ids], device=model.device), logits_to_keep=1)
    return recorder.seen


class _Recorder:
    """Keeps what a prefill shows."""

    def __init__(self, window: int) -> None:
        self._window = window
        self.seen = Activations()

    def wants(self, num_tokens: int) -> bool:
        """Any prompt."""
        return True

    def begin(self, layers: list[int], num_tokens: int) -> None:
        """Notes the layers."""
        self.seen.layers = list(layers)

    def layer(self, seen: PrefilledLayer) -> None:
        """Keeps the keys, and a copy of the few queries, so that the rest can go."""
        self.seen.keys.append(seen.keys)
        queries = seen.window(min(self._window, seen.queries.shape[1])) if self._window else seen.queries[:, :0]
        self.seen.queries.append(queries.clone())

    def end(self, cache: DynamicCache) -> None:
        """Nothing: the cache stays whole."""

    def abandon(self) -> None:
        """Nothing is held elsewhere."""


def texts_of(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Each token's own characters, given `spans`: (start, stop) a token; together they are the text up to the last.

    A character made of several tokens goes to the first; characters that no token claims to the one after them.
    """
    texts, end = [], 0
    for _, stop in spans:
        texts.append(text[end : max(end, stop)])
        end = max(end, stop)
    return texts
