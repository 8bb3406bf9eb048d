"""What a Hugging Face model config says about rotary embedding: frequencies, rotated dimensions, layout.

The formulas are those of transformers' `modeling_rope_utils` (5.23), in float64; `Rope.from_config` is the way in.
Standard library only; knows configs by their attributes and nothing of keys.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from graphkv.terms.errors import InvalidInputError, invalid

__all__ = ["INTERLEAVED", "KINDS", "SLIDING_ALONE", "read_config"]

# No config says how pairs lie: these model types of transformers 5.23 rotate (0, 1), (2, 3), ...; all others (i, i + half).
INTERLEAVED = frozenset({
    "blt_global_transformer", "blt_local_decoder", "blt_local_encoder", "blt_patcher", "codegen", "cohere", "cohere2",
    "cohere2_moe", "ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe_text", "glm", "glm4", "glm4v_text", "glm_ocr_text", "gptj",
    "helium", "llama4_text", "moonshine", "moonshine_streaming",
})  # fmt: skip
# Their full-attention layers do not rotate where others of the model slide: there a key is its own unrotated form.
SLIDING_ALONE = frozenset({"afmoe", "cohere2", "exaone4", "exaone_moe", "flint", "kolibri1"})
NORMED_AFTERWARDS = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text"})
MIRRORED = frozenset({"nanochat"})  # turns by the negative angle


@dataclass(frozen=True, slots=True)
class Rotary:
    """One config, as the formulas of the kinds read it."""

    config: Any
    settings: Mapping[str, Any]
    head_dim: int
    rotary_dim: int
    theta: float
    num_tokens: int | None

    def number(self, name: str) -> float:
        """A setting that its kind cannot do without."""
        value = self.settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(f"rope.{name}", value, "a number in the config's rope_parameters")
        return float(value)

    @property
    def original_tokens(self) -> float:
        """The length that the model was first trained on, wherever its family keeps it."""
        name = "original_max_position_embeddings"
        given = getattr(self.config, name, None) or self.settings.get(name)
        return self.longest if given is None else float(given)

    @property
    def longest(self) -> float:
        """`max_position_embeddings`."""
        return float(self.config.max_position_embeddings)

    def prompt(self, kind: str) -> int:
        """`num_tokens`, for kinds whose frequencies follow the prompt's length."""
        if isinstance(self.num_tokens, bool) or not isinstance(self.num_tokens, int) or self.num_tokens < 1:
            raise invalid("num_tokens", self.num_tokens, f"the prompt's length: a {kind} rope depends on it")
        return self.num_tokens

    def plain(self, theta: float | None = None) -> list[float]:
        """theta ** (-2 i / rotary_dim)."""
        base = self.theta if theta is None else theta
        return [base ** (-2.0 * i / self.rotary_dim) for i in range(self.rotary_dim // 2)]


def read_config(config: Any, *, num_tokens: int | None, interleaved: bool | None) -> tuple[tuple[float, ...], int, bool]:
    """(inv_freq, rotary_dim, interleaved) of the config's full-attention layers; `interleaved` overrules the family's.

    Raises InvalidInputError naming `rope` where the config has no rope, or one that a Rope cannot express; naming
    `num_tokens`, or `rope.NAME` for a setting that its kind needs.
    """
    config = getattr(config, "text_config", None) or config
    family = getattr(config, "model_type", None)
    _check_expressible(config, family)
    settings = _settings(config)
    rotary = _rotary(config, settings or {}, num_tokens)
    kind = rotary.settings.get("rope_type", rotary.settings.get("type", "default"))
    if kind not in KINDS:
        raise _inexpressible(f"of kind {kind!r}", f"one of {', '.join(KINDS)}")
    frequencies = KINDS[kind](rotary)
    sliding_alone = family in SLIDING_ALONE and "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if settings is None or sliding_alone or _layer_theta(config) == 0:
        frequencies = [0.0] * len(frequencies)
    elif family in MIRRORED:
        frequencies = [-frequency for frequency in frequencies]
    layout = family in INTERLEAVED if interleaved is None else interleaved
    return tuple(frequencies), 2 * len(frequencies), layout


def _settings(config: Any) -> Mapping[str, Any] | None:
    """transformers 5 keeps `rope_parameters`, older configs `rope_scaling`; either may hold one entry a layer kind.

    None: the full-attention layers do not rotate.
    """
    settings: Mapping[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if any(isinstance(value, Mapping) for value in settings.values()):
        if "full_attention" not in settings:
            raise _inexpressible(f"for {', '.join(settings)}", "one for full_attention")
        full: Mapping[str, Any] | None = settings["full_attention"]
        return full
    if not settings and not any(getattr(config, name, None) for name in ("rope_theta", "rotary_dim")):
        raise _inexpressible("missing", "in the config")
    return settings


def _rotary(config: Any, settings: Mapping[str, Any], num_tokens: int | None) -> Rotary:
    layers = config.per_layer_config["full_attention"] if getattr(config, "is_heterogeneous", False) else config
    head_dim = getattr(layers, "head_dim", None) or layers.hidden_size // layers.num_attention_heads
    partial = settings.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    rotary_dim = int(head_dim * partial) if partial else getattr(config, "rotary_dim", None) or head_dim
    theta = _layer_theta(config) or settings.get("rope_theta") or getattr(config, "rope_theta", None)
    return Rotary(config, settings, head_dim, rotary_dim, float(theta or 10_000.0), num_tokens)


def _layer_theta(config: Any) -> float | None:
    """The base of the full-attention layers where the config lists one a layer (0: they do not rotate)."""
    thetas = getattr(config, "layer_rope_theta", None)
    if not thetas:
        return None
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(thetas)
    full = {float(theta) for theta, kind in zip(thetas, kinds, strict=False) if kind == "full_attention"}
    if len(full) != 1:
        raise _inexpressible("different from layer to layer", "the same in all full-attention layers")
    return full.pop()


def _check_expressible(config: Any, family: str | None) -> None:
    """A Rope holds one rotation for all layers, of the first dimensions of a key."""
    if getattr(config, "qk_rope_head_dim", None):
        raise _inexpressible("on the last dimensions (latent attention)", "on the first dimensions of a key")
    if family == "cohere2_moe" or not all(getattr(config, "no_rope_layers", None) or (True,)):
        raise _inexpressible("missing in some of the full-attention layers", "the same in all of them")
    if family in NORMED_AFTERWARDS:
        raise _inexpressible("followed by a learned norm", "the last that happens to a key")
    rotates = getattr(config, "position_embedding_type", "rope") in ("rope", "rotary")
    if not rotates or getattr(config, "alibi", False) or not getattr(config, "use_mem_rope", True):
        raise _inexpressible("switched off", "there: compare the keys as they are (post_rope)")


def _inexpressible(given: str, allowed: str) -> InvalidInputError:
    message = f"the config's rope is {given}; it must be {allowed}, or pass similarity_keys= (keys that are already unrotated)"
    return InvalidInputError(message, argument="rope")


def _linear(rotary: Rotary) -> list[float]:
    factor = rotary.number("factor")
    return [frequency / factor for frequency in rotary.plain()]


def _dynamic(rotary: Rotary) -> list[float]:
    """NTK: the base grows with the prompt once it is longer than the model was made for."""
    power = rotary.rotary_dim / (rotary.rotary_dim - 2)
    factor, tokens = rotary.number("factor"), max(rotary.prompt("dynamic"), rotary.longest)
    return rotary.plain(rotary.theta * (factor * tokens / rotary.longest - (factor - 1)) ** power)


def _llama3(rotary: Rotary) -> list[float]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = (rotary.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))

    def stretched(frequency: float) -> float:
        turns = rotary.original_tokens * frequency / (2 * math.pi)
        if turns < low:
            return frequency / factor
        if turns > high:
            return frequency
        blend = (turns - low) / (high - low)
        return (1 - blend) * frequency / factor + blend * frequency

    return [stretched(frequency) for frequency in rotary.plain()]


def _yarn(rotary: Rotary) -> list[float]:
    """YaRN (arXiv:2309.00071): fast pairs are kept, slow ones divided by `factor`, a ramp between them."""
    original = rotary.original_tokens
    factor = rotary.longest / original if rotary.settings.get("factor") is None else rotary.number("factor")

    def pair(turns: float) -> float:
        """The pair that turns that often within the original length."""
        return rotary.rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = pair(rotary.settings.get("beta_fast") or 32), pair(rotary.settings.get("beta_slow") or 1)
    if rotary.settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.rotary_dim - 1)
    width = high - low or 0.001
    slow = [min(max((i - low) / width, 0.0), 1.0) for i in range(rotary.rotary_dim // 2)]
    return [f / factor * share + f * (1 - share) for f, share in zip(rotary.plain(), slow, strict=True)]


def _longrope(rotary: Rotary) -> list[float]:
    """LongRoPE (arXiv:2402.13753): a divisor of its own for each pair, one list for short prompts and one for long."""
    name = "long_factor" if rotary.prompt("longrope") > rotary.original_tokens else "short_factor"
    divisors, plain = rotary.settings.get(name), rotary.plain()
    if not isinstance(divisors, list | tuple) or len(divisors) != len(plain):
        raise invalid(f"rope.{name}", divisors, f"{len(plain)} numbers in the config's rope_parameters")
    return [frequency / divisor for frequency, divisor in zip(plain, divisors, strict=True)]


def _proportional(rotary: Rotary) -> list[float]:
    """Gemma 4: every pair counts as rotated, those after the share stand still."""
    turning = int(float(rotary.settings.get("partial_rotary_factor", 1.0)) * rotary.head_dim // 2)
    factor = float(rotary.settings.get("factor", 1.0))
    moving = [rotary.theta ** (-2.0 * i / rotary.head_dim) / factor for i in range(turning)]
    return moving + [0.0] * (rotary.head_dim // 2 - turning)


KINDS: Mapping[str, Callable[[Rotary], list[float]]] = MappingProxyType({
    "default": Rotary.plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
})  # fmt: skip
