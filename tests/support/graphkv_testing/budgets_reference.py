"""How many tokens every layer keeps, and which of them whatever their score, worked out from the text and plain fields.

Part of the reference: sizes only, but for the budget "cake", which looks at attention.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from graphkv.terms.policy import Policy
from graphkv_testing.states import Cake, Paging

__all__ = ["always_kept", "cake", "cake_figures", "cake_shares", "layer_budgets", "paging", "sinks_of", "window_of"]

_WINDOWS = {"snapkv": 32, "cake": 32, "tova": 1}
_SINKS = {"expected_attention": 4}
Ranges = Sequence[tuple[int, int]]


def window_of(policy: Policy, *, caller_scores: bool) -> int:
    """The policy's if set; else the scorer's own, which does not run where the caller scores."""
    if policy.window is not None:
        return policy.window
    return 0 if caller_scores else _WINDOWS.get(policy.scorer, 0)


def sinks_of(policy: Policy) -> int:
    """The policy's if set, else the scorer's own."""
    return _SINKS.get(policy.scorer, 0) if policy.sinks is None else policy.sinks


def always_kept(num_tokens: int, budget: int, *, pinned: Ranges = (), sinks: int = 0, window: int = 0) -> list[int]:
    """Token ids, ascending. Over the budget: the pinned first, then sinks from the front, then the window from the end."""
    if num_tokens <= budget:
        return list(range(num_tokens))
    kept = {token for start, stop in pinned for token in range(start, stop)}
    if len(kept) > budget:
        raise ValueError(f"{len(kept)} pinned tokens exceed the budget {budget}")
    for token in _sinks_and_window(num_tokens, sinks, window):
        if len(kept) < budget:
            kept.add(token)
    return sorted(kept)


def paging(policy: Policy, num_tokens: int, budget: int, *, pinned: Ranges = (), window: int = 0) -> Paging | None:
    """How pages are counted: floor(B / page_size), at least 1; those with an always-kept token and the last partial one
    are kept. None where the answer is tokens."""
    size = policy.page_size
    if size is None:
        return None
    whole = -(-num_tokens // size)
    if num_tokens <= budget:
        return Paging(size, whole, list(range(whole)))
    count = max(1, budget // size)
    kept = {token // size for start, stop in pinned for token in range(start, stop)}
    if len(kept) > count:
        raise ValueError(f"{len(kept)} pages with pinned tokens exceed {count}")
    order = _sinks_and_window(num_tokens, sinks_of(policy), window)
    for token in [*order, *([num_tokens - 1] if num_tokens % size else [])]:
        if len(kept) < count:
            kept.add(token // size)
    return Paging(size, count, sorted(kept))


def _sinks_and_window(num_tokens: int, sinks: int, window: int) -> list[int]:
    return [*range(min(sinks, num_tokens)), *reversed(range(num_tokens - min(window, num_tokens), num_tokens))]


def layer_budgets(
    policy: Policy,
    num_tokens: int,
    num_layers: int,
    pinned: Ranges = (),
    *,
    caller_scores: bool = False,
    shares: Sequence[int] | None = None,
) -> list[int]:
    """B of every layer: the allocation's, then page_align's. A layer whose B is at least n keeps everything.

    shares: what "cake" gives every layer besides the always-kept tokens; without, the mean.
    """
    n, given = num_tokens, policy.budget
    total = given if isinstance(given, int) else max(1, math.floor(given * n + 1e-9))
    window = window_of(policy, caller_scores=caller_scores)
    budgets = [total] * num_layers
    if policy.budget_allocation in ("pyramid", "cake"):
        kept = len(always_kept(n, total, pinned=pinned, sinks=sinks_of(policy), window=window))
        contended = total - kept
        if policy.budget_allocation == "pyramid":
            if n >= total and contended >= 1 and n >= 2 * contended and num_layers > 1:
                budgets = [kept + own for own in _pyramid(contended, n - kept, num_layers)]
        elif shares is not None:
            budgets = [kept + own for own in shares]
    if policy.page_align is not None:
        p = policy.page_align
        budgets = [n - p * ((n - budget) // p) if n > budget else budget for budget in budgets]
    return budgets


def _pyramid(contended: int, most: int, num_layers: int) -> list[int]:
    low = contended // 20
    high = 2 * contended - low
    if high >= most:
        high = most
        low = 2 * contended - high
    step = (high - low) // (num_layers - 1)
    return [high - layer * step for layer in range(num_layers)]


# --- the budget "cake" --------------------------------------------------------------------------------------------------


def cake(policy: Policy, attention: Sequence[np.ndarray], num_tokens: int, pinned: Ranges = ()) -> Cake | None:
    """attention: of every layer, [Hq, rows, n], at least the window's rows. None where nothing competes."""
    total = layer_budgets(dataclasses.replace(policy, page_align=None), num_tokens, 1)[0]  # aligned after
    window = window_of(policy, caller_scores=False)
    kept = len(always_kept(num_tokens, total, pinned=pinned, sinks=sinks_of(policy), window=window))
    contended, most = total - kept, num_tokens - kept
    if num_tokens <= total or contended == 0:
        return None
    options = {"tau1": 1.6, "tau2": 0.6, **dict(policy.options)}
    exponents = (1.0 / options["tau1"], 1.0 / options["tau2"])
    rows = min(window, num_tokens)
    received = [own[:, own.shape[1] - rows :, : num_tokens - rows] for own in attention]
    figures = [cake_figures(own) for own in received]
    weights = [h ** exponents[0] * v ** exponents[1] if h > 0 and v > 0 else 0.0 for h, v in figures]
    shares = cake_shares(weights, contended, most)
    entropy, variance = [h for h, _ in figures], [v for _, v in figures]
    return Cake(received, entropy, variance, weights, exponents, contended, most, shares)


def cake_figures(received: np.ndarray) -> tuple[float, float]:
    """H and V of attention [Hq, w, tokens before the window]."""
    entropy = -sum(float(a) * math.log(float(a) + 1e-10) for a in received.reshape(-1))
    variance = 0.0
    if received.shape[1] > 1:
        for own in received:
            for column in own.T:
                mean = float(column.mean())
                variance += sum((float(a) - mean) ** 2 for a in column) / (len(column) - 1)
    return entropy, variance


def cake_shares(weights: Sequence[float], contended: int, most: int) -> list[int]:
    """L x B_sel tokens in proportion to the weights: floors, the rest to the largest fractions (ties: the lower layer), at
    most `most` a layer; what is above that is shared again among those that have less. Exact."""
    shares = [0] * len(weights)
    rest = len(weights) * contended
    while rest:
        below = [layer for layer in range(len(weights)) if shares[layer] < most]
        exact = {layer: Fraction(weights[layer]) for layer in below}
        if not any(exact.values()):
            exact = dict.fromkeys(below, Fraction(1))
        quotas = {layer: rest * exact[layer] / sum(exact.values()) for layer in below}
        given = {layer: math.floor(quotas[layer]) for layer in below}
        missing = rest - sum(given.values())
        for layer in sorted(below, key=lambda layer: (given[layer] - quotas[layer], layer))[:missing]:
            given[layer] += 1
        rest = 0
        for layer in below:
            shares[layer] += given[layer]
            rest += max(0, shares[layer] - most)
            shares[layer] = min(shares[layer], most)
    return shares
