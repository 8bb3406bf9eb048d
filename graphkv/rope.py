"""Keys as they were before rotary embedding, so that two mentions of one thing at different places look alike."""

import torch

from graphkv.terms.errors import Reason, invalid
from graphkv.terms.rope import Rope

__all__ = ["average_rope", "unrotate"]


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


def average_rope(
    query_mean: torch.Tensor, query_covariance: torch.Tensor, rope: Rope, *, start: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `expected_attention` needs of queries still to come (arXiv:2510.00636): their rotation, averaged.

    query_mean [..., d] and query_covariance [..., d, d] of queries before rotary embedding; the positions averaged over are
    start, ..., start + count - 1. Returns float64 tensors of the same shapes: R mean and R covariance R^T, R the mean of
    the rotations.
    """
    dim = query_mean.shape[-1]
    if not count > 0:
        raise invalid("count", count, "an integer >= 1", reason=Reason.BAD_SHAPE)
    if rope.rotary_dim > dim:
        raise invalid("rope.rotary_dim", rope.rotary_dim, f"at most head_dim, {dim}", reason=Reason.BAD_SHAPE)
    device = query_mean.device
    frequencies = torch.tensor(rope.inv_freq, dtype=torch.float64, device=device)
    angles = torch.arange(start, start + count, dtype=torch.float64, device=device)[:, None] * frequencies
    cos, sin = angles.cos().mean(dim=0), angles.sin().mean(dim=0)
    rotation = torch.eye(dim, dtype=torch.float64, device=device)
    places = torch.arange(rope.rotary_dim, device=device)
    first, second = _pairs(places, rope)
    rotation[first, first], rotation[second, second] = cos, cos
    rotation[first, second], rotation[second, first] = -sin, sin
    mean = query_mean.to(torch.float64) @ rotation.T
    return mean, rotation @ query_covariance.to(torch.float64) @ rotation.T
