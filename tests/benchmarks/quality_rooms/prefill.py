"""One prefill a prompt, shared by all methods, and judging many cut caches in one forward.

Both go through one attention function of transformers' registry: it keeps the queries while a prompt is prefilled, and
puts a mask of its own while cut caches of different widths are fed. Layers with a sliding window are left alone.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["Prefilled", "Prefiller"]

LOGITS_BYTES = 2**30  # of one forward's logits
ROWS = 96  # the most caches of one forward


@dataclass(frozen=True, slots=True)
class Prefilled:
    """cache: all of it. By full-attention layer, in order: keys, values [Hkv, n, d] and queries [Hq, n, d], post-RoPE, on the
    model's device; queries scaled such that q k^T / sqrt(d) is what the model softmaxes.
    """

    cache: DynamicCache
    num_tokens: int
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    queries: list[torch.Tensor]


class Prefiller:
    """A model with its attention function replaced; `layers` are those with full attention."""

    def __init__(self, model: Any) -> None:
        self.model = model
        kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
        self.layers = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        self._seen: dict[int, torch.Tensor] | None = None
        self._held: dict[int, torch.Tensor] | None = None
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
            if module.layer_idx in self.layers:
                if self._seen is not None:
                    factor = (kwargs.get("scaling") or query.shape[-1] ** -0.5) * math.sqrt(query.shape[-1])
                    self._seen[module.layer_idx] = query[0] * factor
                elif self._held is not None:
                    attention_mask = self._mask(self._held[module.layer_idx], query.shape[2])
            return attend(module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register("graphkv_quality", attention)
        AttentionMaskInterface.register("graphkv_quality", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation("graphkv_quality")

    @torch.no_grad()
    def prefill(self, ids: Sequence[int]) -> Prefilled:
        """Reads one prompt."""
        self._seen = {}
        try:
            cache = DynamicCache(config=self.model.config)
            fed = torch.tensor([list(ids)], device=self.model.device)
            self.model(fed, past_key_values=cache, logits_to_keep=1)
            queries = [self._seen[layer] for layer in self.layers]
        finally:
            self._seen = None
        held = [cache.layers[layer] for layer in self.layers]
        return Prefilled(cache, len(ids), [layer.keys[0] for layer in held], [layer.values[0] for layer in held], queries)

    def feed(self, prefilled: Prefilled, kept: Sequence[Sequence[torch.Tensor]], fed: Sequence[int]) -> Iterator[torch.Tensor]:
        """What each cut cache predicts: logits [m, vocabulary] after each of the m tokens of `fed`; many in one forward.

        kept: by cache, by layer, the kept tokens int64 [Hkv, B]; the caches may differ in width, `prefilled` stays as it is.
        """
        rows = min(ROWS, max(1, LOGITS_BYTES // (4 * len(fed) * self.model.config.vocab_size)))
        for start in range(0, len(kept), rows):
            yield from self._fed(prefilled, kept[start : start + rows], fed)

    @torch.no_grad()
    def _fed(self, prefilled: Prefilled, kept: Sequence[Sequence[torch.Tensor]], fed: Sequence[int]) -> torch.Tensor:
        device = self.model.device
        cache = self._cut(prefilled, kept)
        ids = torch.tensor([list(fed)], device=device).expand(len(kept), -1)
        places = torch.arange(prefilled.num_tokens, prefilled.num_tokens + len(fed), device=device)
        try:
            found: torch.Tensor = self.model(ids, past_key_values=cache, position_ids=places.expand(len(kept), -1)).logits
        finally:
            self._held = None
        return found

    def _cut(self, prefilled: Prefilled, kept: Sequence[Sequence[torch.Tensor]]) -> DynamicCache:
        """A copy of the cache with a row for each of `kept`, padded to the widest of a layer; the padding is masked."""
        cache = DynamicCache(config=self.model.config)
        self._held = {}
        device = self.model.device
        for index, layer in enumerate(prefilled.cache.layers):
            if index not in self.layers:
                made = copy.copy(layer)
                made.keys, made.values = (part.expand(len(kept), -1, -1, -1) for part in (layer.keys, layer.values))
                cache.layers[index] = made
                continue
            place = self.layers.index(index)
            widths = torch.tensor([tokens[place].shape[1] for tokens in kept])
            padded = pad_sequence([tokens[place].T for tokens in kept], batch_first=True)  # [rows, widest, Hkv]
            ids = padded.to(device).transpose(1, 2)[..., None]
            full = prefilled.keys[place], prefilled.values[place]
            parts = (part.expand(len(kept), -1, -1, -1).gather(2, ids.expand(-1, -1, -1, part.shape[-1])) for part in full)
            cache.update(*parts, index)
            self._held[index] = (torch.arange(int(widths.max())) < widths[:, None]).to(device)
        return cache

    @staticmethod
    def _mask(held: torch.Tensor, fed: int) -> torch.Tensor:
        """bool [rows, 1, m, W + m]: every kept token, and of the fed ones those up to oneself."""
        causal = torch.ones(fed, fed, dtype=torch.bool, device=held.device).tril()
        before = held[:, None, None, :].expand(-1, 1, fed, -1)
        return torch.cat([before, causal.expand(held.shape[0], 1, -1, -1)], dim=-1)
