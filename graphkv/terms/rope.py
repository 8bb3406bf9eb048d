"""Rope: how a model rotates its keys, so that the graph can compare them as they were before (similarity="pre_rope").

Standard library only: numbers in, numbers out. `rope_kinds` reads configs, `graphkv.rope` does the unrotating.
"""

import math
from dataclasses import dataclass
from typing import Any

from graphkv.terms.errors import invalid
from graphkv.terms.rope_kinds import read_config

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
    def from_config(cls, config: Any, *, num_tokens: int | None = None, interleaved: bool | None = None) -> "Rope":
        """The rope of a Hugging Face model config (`model.config`), as transformers' rotary modules compute it.

        Knows the kinds default, linear, dynamic, llama3, yarn, longrope and proportional, with partial rotary; with a
        rope per layer kind, that of the full-attention layers (where only sliding layers rotate: all zeros).
        num_tokens: the prompt's length; dynamic and longrope need it. interleaved: how pairs lie; no config says it,
        so None means what transformers does for this `model_type`, and halves for one that it does not know. A rope on
        several axes (mrope) is read as text alone sees it.
        Raises InvalidInputError: for a rope that one Rope cannot express it names the way out, `similarity_keys=`.
        """
        return cls(*read_config(config, num_tokens=num_tokens, interleaved=interleaved))
