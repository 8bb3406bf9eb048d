"""NVIDIA kvpress as a peer: its presses run on a real model, and what they saw and kept is written down.

Nothing of a peer is written again here: a press is hooked into a model as its users hook it, scores with its own code and cuts
the cache; the kept tokens are read off the cut cache. Only `./dev test-peers` has kvpress.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

__all__ = ["Drawn", "Prefill", "Seen", "draw", "prefill", "removed"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One random case: a tiny Llama's shape and what is asked of it."""

    seed: int
    tokens: int
    layers: int
    kv_heads: int
    group: int
    head_dim: int
    budget: int
    window: int
    pool_width: int

    @property
    def id(self) -> str:
        """For pytest."""
        shape = f"n{self.tokens}-L{self.layers}-h{self.kv_heads}x{self.group}-d{self.head_dim}"
        return f"s{self.seed}-{shape}-B{self.budget}-w{self.window}-p{self.pool_width}"

    def model(self) -> Any:
        """Random weights, large enough that attention has preferences."""
        torch.manual_seed(self.seed)
        heads = self.kv_heads * self.group
        config = LlamaConfig(
            vocab_size=8, hidden_size=48, intermediate_size=32, num_hidden_layers=self.layers, num_attention_heads=heads,
            num_key_value_heads=self.kv_heads, head_dim=self.head_dim, initializer_range=0.3, max_position_embeddings=1024,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        """Embeddings of which no two are equal, so that no two tokens tie."""
        return {"inputs_embeds": torch.randn(1, self.tokens, 48, generator=torch.Generator().manual_seed(self.seed))}


def draw(seed: int) -> Drawn:
    """The same case for the same seed; odd sizes, budgets from just above the window's to almost everything."""
    rng = np.random.default_rng([seed, 97])

    def pick(*options: int) -> int:
        return int(rng.choice(options))

    tokens, window = pick(23, 40, 61, 97, 128, 203), pick(1, 3, 8, 16)
    budget = int(rng.integers(max(window, 4) + 1, tokens))  # room beside the window and four sinks
    return Drawn(seed, tokens, pick(1, 2, 3), pick(1, 2, 3), pick(1, 2, 4), pick(8, 16, 24), budget, window, pick(1, 3, 5, 7))


@dataclass(frozen=True, slots=True)
class Seen:
    """One layer before the cut: keys, values [Hkv, n, d], queries [Hq, n, d], post-RoPE and before; the attention module."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    plain_queries: torch.Tensor
    module: Any


@dataclass(slots=True)
class Prefill:
    """What a press did to one prompt, a layer at a time: what there was, its scores [Hkv, n], what it kept, as sets a head."""

    seen: list[Seen] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    kept: list[list[set[int]]] = field(default_factory=list)


def removed(tokens: int, budget: int) -> float:
    """The peer's compression ratio that keeps exactly `budget` tokens: int(tokens * (1 - ratio))."""
    return 1.0 - (budget + 0.5) / tokens


def prefill(model: Any, press: Any, inputs: dict[str, torch.Tensor]) -> Prefill:
    """One prompt through the model under the press."""
    done = Prefill()
    cache = DynamicCache()
    with torch.no_grad(), _watched(model, press, done), press(model):
        model.model(**inputs, past_key_values=cache, use_cache=True)
    for layer, seen in enumerate(done.seen):
        masked = getattr(seen.module, "masked_key_indices", None)  # AdaKV masks instead of cutting
        rows = _unmasked(seen.keys, masked) if masked is not None else _found(cache.layers[layer].keys[0], seen.keys)
        done.kept.append(rows)
        seen.module.masked_key_indices = None
    return done


@contextmanager
def _watched(model: Any, press: Any, done: Prefill) -> Iterator[None]:
    """Our hooks stand before the press's own, so they see the whole cache; its score() is called through, and noted."""

    def before_the_press(module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        hidden = kwargs["hidden_states"]
        queries = module.q_proj(hidden).view(1, hidden.shape[1], -1, module.head_dim).transpose(1, 2)
        rotated, _ = apply_rotary_pos_emb(queries, queries, *kwargs["position_embeddings"])
        done.seen.append(Seen(layer.keys[0].clone(), layer.values[0].clone(), rotated[0], queries[0], module))

    scorer = getattr(press, "press", press)
    score: Callable[..., torch.Tensor] = scorer.score

    def noted(*given: Any) -> torch.Tensor:
        scores = score(*given)
        done.scores.append(scores[0].clone())
        return scores

    hooks = [layer.self_attn.register_forward_hook(before_the_press, with_kwargs=True) for layer in model.model.layers]
    scorer.score = noted
    try:
        yield
    finally:
        del scorer.score
        for hook in hooks:
            hook.remove()


def _found(kept: torch.Tensor, keys: torch.Tensor) -> list[set[int]]:
    """Which of the keys [Hkv, n, d] were kept [Hkv, B, d]: the peer gathers them bit for bit, in an order of its own."""
    rows = []
    for few, every in zip(kept.numpy(), keys.numpy(), strict=True):
        places = {key.tobytes(): token for token, key in enumerate(every)}
        assert len(places) == len(every), "two tokens of one head have the same key"
        rows.append({places[key.tobytes()] for key in few})
    return rows


def _unmasked(keys: torch.Tensor, masked: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> list[set[int]]:
    _, heads, tokens = masked
    return [set(range(keys.shape[1])) - set(tokens[heads == head].tolist()) for head in range(keys.shape[0])]
