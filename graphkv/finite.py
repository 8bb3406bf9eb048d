"""NaN and infinity are the caller's mistake: found in one pass without a copy, and named by layer, head and token."""

import math

import torch

from graphkv.terms.errors import InvalidInputError, Reason

__all__ = ["check_finite", "check_scores"]

_HEADS = dict.fromkeys(("queries", "attention", "query_mean", "query_covariance"), "query head")


def check_finite(role: str, tensor: torch.Tensor, layer: int, *, ids: torch.Tensor | None = None, first_head: int = 0) -> None:
    """Raises InvalidInputError (NON_FINITE) where `tensor` [heads, tokens, ...] holds NaN or infinity.

    `ids` [heads, tokens] names the tokens where the tensor holds only some of them; `first_head` the first of the heads.
    """
    if tensor.numel() == 0:
        return
    readable = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.float16)  # float8 has no reductions
    low, high = torch.aminmax(readable)  # NaN wins both
    if math.isfinite(low.item()) and math.isfinite(high.item()):
        return
    bad = torch.isfinite(readable).logical_not_().flatten(2).any(-1).nonzero()[0]
    _refuse(role, readable[bad[0], bad[1]], layer, bad, ids, first_head)


def check_scores(scores: torch.Tensor, competes: torch.Tensor, layer: int) -> None:
    """Raises InvalidInputError where a competing token's score is NaN or +infinity; -infinity is padding.

    scores float32 [Hkv, n]; competes bool [n], False at always-kept tokens, whose scores are ignored.
    """
    bad = (torch.isnan(scores) | torch.isposinf(scores)) & competes
    if bad.any():
        first = bad.nonzero()[0]
        _refuse("scores", scores[first[0], first[1]], layer, first)


def _refuse(
    role: str, values: torch.Tensor, layer: int, where: torch.Tensor, ids: torch.Tensor | None = None, first_head: int = 0
) -> None:
    head, token = int(where[0]), int(where[1])
    if ids is not None:
        token = int(ids[head, token])
    values = values.reshape(-1)
    value = float(values[torch.isfinite(values).logical_not()][0])
    place = f"layer {layer}, {_HEADS.get(role, 'KV head')} {first_head + head}, {'row' if role in _HEADS else 'token'} {token}"
    raise InvalidInputError(f"{role} hold {value} at {place}; they must be finite", argument=role, reason=Reason.NON_FINITE)
