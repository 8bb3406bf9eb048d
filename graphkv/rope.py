"""Keys as they were before rotary embedding, so that two mentions of one thing at different places look alike."""

import torch

from graphkv.terms.errors import Reason, invalid
from graphkv.terms.rope import Rope

__all__ = ["unrotate"]


def unrotate(keys: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
    """float64 [tokens, d]: `keys` [tokens, d] turned back by positions [tokens] * inv_freq.

    Angles in float64: in float32 those of a token at 100,000 would be off by 1/100. The dimensions after `rotary_dim`
    were never rotated.
    """
    if rope.rotary_dim > keys.shape[-1]:
        raise invalid("rope.rotary_dim", rope.rotary_dim, f"at most head_dim, {keys.shape[-1]}", reason=Reason.BAD_SHAPE)
    frequencies = torch.tensor(rope.inv_freq, dtype=torch.float64, device=keys.device)
    angles = positions.to(torch.float64)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    plain = keys.to(torch.float64, copy=True)
    first, second = _pairs(plain, rope)
    turned = first * cos + second * sin, second * cos - first * sin
    first.copy_(turned[0])
    second.copy_(turned[1])
    return plain


def _pairs(keys: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """The two members of each rotated pair, as views."""
    rotated = keys[..., : rope.rotary_dim]
    if rope.interleaved:
        return rotated[..., 0::2], rotated[..., 1::2]
    half = rope.rotary_dim // 2
    return rotated[..., :half], rotated[..., half:]
