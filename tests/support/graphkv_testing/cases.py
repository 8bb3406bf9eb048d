"""Cases: small prompts and policies from everywhere the library's space has a corner; seeded, with readable ids.

A `Spec` is plain choices, drawn by a seeded generator (`seeded`) or by hypothesis (`specs`), or written by hand
(`graphkv_testing.corners`); `Case(spec)` makes the tensors. Every tensor exists twice: as torch gives it to the library, and as the float64 numpy
array of the very same values, for the reference.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from graphkv.terms.policy import Policy
from graphkv.terms.rope import Rope
from graphkv_testing.corners import corners, large
from graphkv_testing.reference import select_prompt
from graphkv_testing.spec import Spec, draw_spec
from graphkv_testing.states import LayerState

__all__ = ["Case", "Spec", "corners", "large", "seeded", "specs"]

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Case:
    """A spec's tensors: `inputs()` for `graphkv.select`, `states()` from the reference."""

    spec: Spec
    policy: Policy = field(init=False)
    rope: Rope | None = field(init=False, default=None)
    arrays: dict[str, list[torch.Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Makes everything; the same spec always gives the same bits."""
        spec, rng = self.spec, np.random.default_rng([self.spec.seed, self.spec.tokens, 77])
        self.policy = spec.make_policy()
        window = min(self.policy.observation_window(), spec.tokens)
        positions = [_positions(spec, rng) for _ in range(spec.layers)]
        if spec.rope in ("full", "partial", "interleaved"):
            self.rope = _rope(spec)
        keys = [_keys(spec, rng) for _ in range(spec.layers)]
        pre_rope = self.policy.graph is not None and self.policy.graph.similarity == "pre_rope"
        if self.rope is not None and pre_rope:
            keys = [_rotated(key, where, self.rope) for key, where in zip(keys, positions, strict=True)]
            if spec.positions != "default":
                self.arrays["positions"] = [torch.from_numpy(where) for where in positions]
        self._put("keys", keys, spec.dtype)
        if spec.rope == "similarity_keys" and pre_rope:
            wide = dataclasses.replace(spec, head_dim=spec.head_dim + 3, seed=spec.seed + 1)
            self._put("similarity_keys", [_keys(wide, rng) for _ in range(spec.layers)], spec.dtype)
        query_heads = spec.kv_heads * spec.group
        if spec.importance == "queries":
            drawn = [rng.normal(size=(query_heads, window, spec.head_dim)) for _ in range(spec.layers)]
            self._put("queries", drawn, spec.dtype)
        elif spec.importance in ("attention", "attention_f16"):
            drawn = [_attention(query_heads, window, spec.tokens, rng) for _ in range(spec.layers)]
            self._put("attention", drawn, "f16" if spec.importance == "attention_f16" else "f32")
        elif spec.importance == "scores":
            drawn = [_scores(spec, rng) for _ in range(spec.layers)]
            self._put("scores", drawn, "f32" if spec.dtype == "bf16" else spec.dtype)

    def _put(self, role: str, arrays: list[np.ndarray], dtype: str) -> None:
        self.arrays[role] = [torch.from_numpy(array).to(DTYPES[dtype]) for array in arrays]

    def inputs(self, *, stacked: bool = True) -> dict[str, Any]:
        """Keyword arguments of `graphkv.select`; tensors stacked over the layers, or as lists of layers."""
        given: dict[str, Any] = {role: torch.stack(layers) if stacked else layers for role, layers in self.arrays.items()}
        return {**given, "policy": self.policy, "pinned": list(self.spec.pinned) or None, "rope": self.rope}

    def states(self, **changes: Any) -> list[LayerState]:
        """The reference's layers; `changes` replace arguments of `select_prompt`."""
        given = {role: [layer.double().numpy() for layer in layers] for role, layers in self.arrays.items()}
        return select_prompt(**{**given, "policy": self.policy, "pinned": self.spec.pinned, "rope": self.rope, **changes})


# --- the space ----------------------------------------------------------------------------------------------------------


def seeded(count: int, first: int = 0) -> Iterator[Spec]:
    """`count` specs, the same ones every time."""
    for seed in range(first, first + count):
        rng = np.random.default_rng([seed, 4242])

        def choose(_name: str, options: Sequence[Any], rng: np.random.Generator = rng) -> Any:
            return options[int(rng.integers(len(options)))]

        yield draw_spec(choose, seed)


@st.composite
def specs(draw: st.DrawFn, **fixed: Any) -> Spec:
    """The same space for hypothesis; `fixed` names fields of Spec to hold."""
    spec = draw_spec(lambda _name, options: draw(st.sampled_from(list(options))), draw(st.integers(0, 2**16)))
    return dataclasses.replace(spec, **fixed)


# --- the tensors ----------------------------------------------------------------------------------------------------------


def _keys(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """[Hkv, n, d]; clustered: a few directions with a little noise, so that neighbours above 0.9 exist."""
    shape = (spec.kv_heads, spec.tokens, spec.head_dim)
    keys = rng.normal(size=shape)
    if spec.keys == "random":
        return keys
    centres = rng.normal(size=(spec.kv_heads, max(2, spec.tokens // 6), spec.head_dim))
    which = rng.integers(centres.shape[1], size=spec.tokens)
    size = rng.uniform(0.5, 2.0, size=(spec.kv_heads, spec.tokens, 1))
    keys = size * (centres[:, which] + rng.choice([0.05, 0.2, 0.5], size=(spec.tokens, 1)) * keys)
    if spec.keys == "duplicated":
        alike = rng.integers(spec.tokens, size=(spec.tokens + 1) // 2)
        keys[:, rng.permutation(spec.tokens)[: len(alike)]] = keys[:, alike]
    elif spec.keys == "zeros":
        keys[:, rng.permutation(spec.tokens)[: max(1, spec.tokens // 4)]] = 0.0
    return keys


def _scores(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """[Hkv, n]."""
    scores = rng.gamma(1.0, size=(spec.kv_heads, spec.tokens))
    if spec.scores == "ties":
        return np.ceil(scores * 2) / 4
    if spec.scores == "zeros":
        return np.where(scores > 1.0, 0.25, 0.0)
    if spec.scores in ("negative", "mixed"):
        return scores - (10.0 if spec.scores == "negative" else 1.0)
    if spec.scores in ("padded", "sparse"):
        padding = rng.random(scores.shape) < (0.3 if spec.scores == "padded" else 0.9)
        return np.where(padding, -np.inf, scores)
    return scores


def _attention(query_heads: int, window: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """[Hq, w, n], each row a distribution over what its query sees."""
    logits = 2.0 * rng.normal(size=(query_heads, window, tokens))
    seen = np.arange(tokens) <= (tokens - window + np.arange(window))[:, None]
    weights = np.where(seen, np.exp(logits), 0.0)
    return weights / weights.sum(axis=-1, keepdims=True)


def _positions(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """[n] or [Hkv, n]: ascending, as a cache that has been cut before would have them."""
    shape = (spec.kv_heads, spec.tokens) if spec.positions == "per_head" else (spec.tokens,)
    if spec.positions == "default":
        return np.arange(spec.tokens)
    return np.cumsum(rng.integers(1, 9, size=shape), axis=-1)


def _rope(spec: Spec) -> Rope:
    rotary_dim = max(2, spec.head_dim // 2 // 2 * 2) if spec.rope == "partial" else spec.head_dim
    frequencies = tuple(10_000.0 ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2))
    return Rope(frequencies, rotary_dim, interleaved=spec.rope == "interleaved")


def _rotated(keys: np.ndarray, positions: np.ndarray, rope: Rope) -> np.ndarray:
    """As a model rotates them: (a, b) -> (a cos - b sin, b cos + a sin)."""
    half = rope.rotary_dim // 2
    first = np.arange(half) * 2 if rope.interleaved else np.arange(half)
    second = first + 1 if rope.interleaved else first + half
    angle = np.broadcast_to(positions, keys.shape[:2])[..., None] * np.array(rope.inv_freq)
    turned = keys.copy()
    turned[..., first] = keys[..., first] * np.cos(angle) - keys[..., second] * np.sin(angle)
    turned[..., second] = keys[..., second] * np.cos(angle) + keys[..., first] * np.sin(angle)
    return turned
