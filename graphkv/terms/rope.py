"""Rope: how a model rotates its keys, so that the graph can compare them as they were before (similarity="pre_rope").

Standard library only: numbers in, numbers out. `graphkv.rope` does the unrotating.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphkv.terms.errors import invalid

__all__ = ["Rope"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one kind of layer.

    Token t's pair i is rotated by position_t * inv_freq[i]. `inv_freq` has rotary_dim / 2 entries; the first
    `rotary_dim` dimensions of a key are rotated, the rest pass. `interleaved`: pairs are (0, 1), (2, 3), ... instead of
    (i, i + rotary_dim / 2). A scale that some kinds put on cosines and sines (yarn) changes no similarity and is not
    kept.
    """

    inv_freq: tuple[float, ...]
    rotary_dim: int
    interleaved: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rotary_dim, bool) or not isinstance(self.rotary_dim, int) or self.rotary_dim < 2:
            raise invalid("rope.rotary_dim", self.rotary_dim, "an even integer >= 2")
        try:
            frequencies = tuple(float(value) for value in self.inv_freq)
        except (TypeError, ValueError):
            raise invalid("rope.inv_freq", self.inv_freq, "a sequence of rotary_dim / 2 finite numbers") from None
        if len(frequencies) * 2 != self.rotary_dim or not all(map(math.isfinite, frequencies)):
            given = f"{len(frequencies)} values for rotary_dim {self.rotary_dim}"
            raise invalid("rope.inv_freq", given, "rotary_dim / 2 finite numbers")
        object.__setattr__(self, "inv_freq", frequencies)

    @classmethod
    def from_config(cls, config: Any, *, num_tokens: int | None = None) -> "Rope":
        """The rope of a Hugging Face model config (`model.config`), by the formulas of transformers' `modeling_rope_utils`.

        Knows the kinds default, linear and llama3, with partial rotary; with a rope per layer kind, that of the
        full-attention layers. A kind it does not know raises InvalidInputError: pass `similarity_keys=` instead.
        `num_tokens` is the prompt's length, which these kinds do not need.
        """
        config = getattr(config, "text_config", None) or config
        settings = _settings(config)
        kind = settings.get("rope_type", settings.get("type", "default"))
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        partial = settings.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
        rotary_dim = int(head_dim * partial)
        theta = float(settings.get("rope_theta", getattr(config, "rope_theta", None) or 10000.0))
        frequencies = [theta ** (-2.0 * i / rotary_dim) for i in range(rotary_dim // 2)]
        if kind == "linear":
            frequencies = [value / float(settings["factor"]) for value in frequencies]
        elif kind == "llama3":
            frequencies = [_llama3(value, settings) for value in frequencies]
        elif kind != "default":
            raise invalid("rope", kind, "one of default, linear, llama3; for other kinds pass similarity_keys=")
        return cls(tuple(frequencies), rotary_dim)


def _settings(config: Any) -> Mapping[str, Any]:
    """transformers 5 keeps `rope_parameters`, older configs `rope_scaling`; either may hold one entry a layer kind."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    full = settings.get("full_attention")
    return full if isinstance(full, Mapping) else settings


def _llama3(frequency: float, settings: Mapping[str, Any]) -> float:
    """Llama 3.1's rule: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = (float(settings[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(settings["original_max_position_embeddings"]) * frequency / (2 * math.pi)
    if turns < low:
        return frequency / factor
    if turns > high:
        return frequency
    blend = (turns - low) / (high - low)
    return (1 - blend) * frequency / factor + blend * frequency
