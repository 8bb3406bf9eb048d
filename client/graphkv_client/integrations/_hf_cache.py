"""What a transformers cache becomes once tokens are dropped: layers that still report the true length.

Knows transformers' caches and which slots to keep; nothing of models, streams or the service.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from graphkv.terms.errors import Reason, invalid

__all__ = ["CompressedLayer", "cache_argument", "compressible", "cut", "prepare"]


class CompressedLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # of its __init_subclass__
    """A full-attention cache layer that remembers how many tokens went in, not only how many it holds.

    transformers takes rotary positions, and which of `input_ids` are new, from `get_seq_length()`, and the mask's width
    and offset from `get_mask_sizes()`. With the true length there and `dropped` as the offset here, the kept tokens look
    to the mask like the most recent ones, as in a sliding-window layer, and new tokens get positions n, n + 1, ...
    """

    is_croppable = False  # a position says no longer in which slot its token lies
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.dropped = 0

    @classmethod
    def of(cls, layer: DynamicLayer) -> "CompressedLayer":
        """A compressed layer that holds what `layer` holds; the tensors are shared until `evict`."""
        made = cls()
        made.__dict__.update(layer.__dict__)
        return made

    def evict(self, kept: torch.Tensor) -> None:
        """Keeps the slots `kept`, integers [Hkv, B], of keys and values [1, Hkv, n, d]; the rest is freed."""
        held = self.keys.shape[-2]
        slots = kept.to(device=self.keys.device, dtype=torch.int64)[None, :, :, None]
        self.keys = self.keys.gather(2, slots.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, slots.expand(-1, -1, -1, self.values.shape[-1]))
        self.dropped += held - self.keys.shape[-2]

    def get_seq_length(self) -> int:
        """How many tokens went in, dropped ones included."""
        return super().get_seq_length() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens held once `query_length` new ones are in, tokens dropped before them)."""
        return super().get_seq_length() + query_length, self.dropped

    def reset(self) -> None:
        """Forgets everything, also how many tokens were dropped."""
        super().reset()
        self.dropped = 0


def cache_argument(model: Any) -> str:
    """What the model's `forward` calls its cache: "cache" since transformers 5.24, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def prepare(cache: Any, config: Any) -> DynamicCache:
    """The same, empty cache with its full-attention layers made CompressedLayers; sliding-window layers stay as they are.

    Raises InvalidInputError for a kind of cache, or of layer, whose tokens cannot be dropped one by one.
    """
    if type(cache) is not DynamicCache:
        raise invalid("cache", type(cache).__name__, "a DynamicCache", reason=Reason.BAD_SHAPE)
    layers = cache.layers or DynamicCache(config=config).layers
    for layer in layers:
        if type(layer) not in (DynamicLayer, CompressedLayer, DynamicSlidingWindowLayer):
            allowed = "full attention or a sliding window in every layer"
            raise invalid("cache", type(layer).__name__, allowed, reason=Reason.BAD_SHAPE)
    cache.layers = [CompressedLayer() if type(layer) is DynamicLayer else layer for layer in layers]
    return cache


def compressible(cache: DynamicCache) -> list[int]:
    """The layers whose tokens can be dropped, ascending; all but those with a sliding window."""
    return [index for index, layer in enumerate(cache.layers) if type(layer) in (DynamicLayer, CompressedLayer)]


def cut(cache: DynamicCache, kept: Mapping[int, torch.Tensor]) -> DynamicCache:
    """A shorter copy of `cache`, which stays as it is: layer l keeps its slots `kept[l]`, integers [Hkv, B].

    Layers not named are copied whole. New tokens can be fed to the copy as to the original.
    """
    short = copy.copy(cache)
    short.layers = []
    for index, layer in enumerate(cache.layers):
        if index in kept and isinstance(layer, DynamicLayer):
            made = CompressedLayer.of(layer)
            made.evict(kept[index])
            short.layers.append(made)
        else:
            short.layers.append(copy.deepcopy(layer))
    return short
