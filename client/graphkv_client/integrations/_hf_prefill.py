"""Looking on while a transformers model prefills: each layer's keys and queries, as soon as it has computed them.

Three public doors of transformers and no model code: a registered attention function, the same mask as before, and
hooks on the model's forward. Knows nothing of policies, selections or the service.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graphkv.terms.errors import Reason, invalid
from graphkv_client.integrations._hf_cache import cache_argument, compressible, prepare

__all__ = ["Observer", "PrefilledLayer", "observe_prefill"]


@dataclass(frozen=True, slots=True)
class PrefilledLayer:
    """One layer of a prefill that is still running; batch size 1.

    layer: the model's own number of it. keys [Hkv, n, d] and queries [Hq, n, d]: post-RoPE views, the model's dtype and
    device. scaling: what the model multiplies queries by keys with.
    """

    layer: int
    keys: torch.Tensor
    queries: torch.Tensor
    scaling: float

    def window(self, width: int) -> torch.Tensor:
        """The last `width` queries [Hq, w, d], such that q k^T / sqrt(d) is what the model softmaxes."""
        queries = self.queries[:, -width:]
        factor = self.scaling * math.sqrt(queries.shape[-1])
        return queries if math.isclose(factor, 1.0, rel_tol=1e-6) else queries * factor


class Observer(Protocol):
    """What is told of a prefill. Between `begin` and `end` or `abandon` comes each of the layers once, in the model's order."""

    def wants(self, num_tokens: int) -> bool:
        """Whether a prompt of this length is to be observed at all."""

    def begin(self, layers: list[int], num_tokens: int) -> None:
        """A prefill starts; `layers` will be seen (those with a sliding window are not)."""

    def layer(self, seen: PrefilledLayer) -> None:
        """One layer's keys and queries; its attention is computed next."""

    def end(self, cache: DynamicCache) -> None:
        """The prefill is done and `cache` is full; what it answers with is computed already."""

    def abandon(self) -> None:
        """The prefill failed. Also called when all is over; may find nothing to do."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    observer: Observer
    layers: list[int]
    cache: DynamicCache


_running: ContextVar[_Prefill | None] = ContextVar("graphkv_prefill", default=None)


@contextlib.contextmanager
def observe_prefill(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Tells `observer` of every prefill of `model` (a forward on an empty cache) within the block.

    Not thread-safe: one block and one forward at a time a model. Raises InvalidInputError for an attention
    implementation that is not one of transformers' registered ones, and, from the model's forward, for what cannot be
    observed yet: batches, padding, positions that are not 0, 1, 2, ...
    """
    before = model.config._attn_implementation
    hooks = []
    model.set_attn_implementation(_registered(before))
    try:
        hooks.append(model.register_forward_pre_hook(_Before(observer), with_kwargs=True))
        hooks.append(model.register_forward_hook(_after, with_kwargs=True, always_call=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)
        _running.set(None)
        observer.abandon()


def _registered(base: str) -> str:
    """Registers the attention function that looks on and then calls `base`; its name."""
    known = sorted(name for name in ALL_ATTENTION_FUNCTIONS if "|" not in name and not name.startswith("graphkv_"))
    if base not in known or base not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise invalid("attn_implementation", base, f"one of {', '.join(known)}", reason=Reason.UNKNOWN_NAME)
    attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[base]

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        running = _running.get()
        layer = getattr(module, "layer_idx", None)
        if running is not None and layer in running.layers:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            running.observer.layer(PrefilledLayer(layer, key[0].detach(), query[0].detach(), scaling))
        return attend(module, query, key, value, attention_mask, **kwargs)

    name = f"graphkv_{base}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


@dataclass(frozen=True, slots=True)
class _Before:
    """The pre-forward hook: decides whether this forward is a prefill to observe, and makes its cache ready."""

    observer: Observer

    def __call__(self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _running.set(None)  # every forward passes here first, so nothing stale outlives one that failed
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        fed = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        name = cache_argument(module)
        cache = given.get(name, given.get("past_key_values"))
        if cache is None and given.get("use_cache", module.config.use_cache):
            cache = DynamicCache(config=module.config)
        if fed is None or not isinstance(cache, Cache) or cache.get_seq_length() > 0:
            return None
        if not self.observer.wants(fed.shape[1]):
            return None
        _check(given, *fed.shape[:2])
        cache = prepare(cache, module.config)
        layers = compressible(cache)
        if not layers:
            return None
        self.observer.begin(layers, fed.shape[1])
        _running.set(_Prefill(self.observer, layers, cache))
        given.pop("past_key_values", None)  # a caller may still use the older name
        return (), {**given, name: cache}


def _after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
    """The forward hook; also called, without an output, where the forward raised."""
    running = _running.get()
    _running.set(None)
    if running is None:
        return
    if output is None:
        running.observer.abandon()
    else:
        running.observer.end(running.cache)


def _check(given: Mapping[str, Any], batch: int, num_tokens: int) -> None:
    """Refuses what would be observed wrongly."""
    if batch != 1:
        raise invalid("input_ids", f"a batch of {batch}", "one prompt: batches are not compressed yet", reason=Reason.BAD_SHAPE)
    mask = given.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
        allowed = "2-d and all ones: padded prompts are not compressed yet"
        raise invalid("attention_mask", list(mask.shape), allowed, reason=Reason.BAD_SHAPE)
    positions = given.get("position_ids")
    if positions is not None:
        expected = torch.arange(num_tokens, device=positions.device)
        if positions.shape[-1] != num_tokens or not bool((positions == expected).all()):
            allowed = "0, 1, 2, ... or left out: other positions are not compressed yet"
            raise invalid("position_ids", list(positions.shape), allowed, reason=Reason.BAD_SHAPE)
