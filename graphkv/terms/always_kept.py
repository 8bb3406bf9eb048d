"""Which tokens are kept whatever their score: pinned ranges, sinks and the observation window. Integers only."""

from collections.abc import Sequence

from graphkv.terms.errors import Reason, invalid

__all__ = ["always_kept", "check_pinned", "count", "merge"]

Range = tuple[int, int]


def always_kept(
    num_tokens: int, budget: int, *, pinned: Sequence[Range] = (), sinks: int = 0, window: int = 0
) -> tuple[Range, ...]:
    """The always-kept tokens as disjoint, ascending ranges (start, stop), each token once.

    The union of `pinned`, the first `sinks` and the last min(`window`, n) tokens. If that is more than `budget`: the
    pinned first, then the sinks from the front, then the window from the end. Raises InvalidInputError where the pinned
    tokens alone are more than the budget (and not all tokens are kept anyway).
    """
    if num_tokens <= budget:
        return ((0, num_tokens),)
    kept = merge(pinned)
    if count(kept) > budget:
        raise invalid("pinned", f"{count(kept)} tokens", f"at most the budget, {budget}")
    kept = _fill(kept, range(min(sinks, num_tokens)), budget)
    return _fill(kept, range(num_tokens - 1, num_tokens - 1 - min(window, num_tokens), -1), budget)


def check_pinned(pinned: Sequence[Range], num_tokens: int) -> tuple[Range, ...]:
    """The caller's ranges as tuples of ints; each must be 0 <= start < stop <= n, or InvalidInputError names it."""
    checked = []
    for given in pinned:
        try:
            start, stop = given
            ok = not isinstance(start, bool) and 0 <= start < stop <= num_tokens
        except (TypeError, ValueError):
            ok = False
        if not ok:
            raise invalid("pinned", given, f"(start, stop) with 0 <= start < stop <= {num_tokens}", reason=Reason.BAD_SHAPE)
        checked.append((int(start), int(stop)))
    return tuple(checked)


def merge(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Overlapping and touching ranges joined; ascending."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)


def count(ranges: Sequence[Range]) -> int:
    """How many tokens disjoint ranges hold."""
    return sum(stop - start for start, stop in ranges)


def _fill(kept: tuple[Range, ...], tokens: range, budget: int) -> tuple[Range, ...]:
    """Adds `tokens`, in their order, as long as the budget lasts; those already kept cost nothing."""
    room = budget - count(kept)
    taken = 0
    for token in tokens:
        if not any(start <= token < stop for start, stop in kept):
            if room == 0:
                break
            room -= 1
        taken += 1
    added = tokens[:taken]
    if not added:
        return kept
    low, high = min(added[0], added[-1]), max(added[0], added[-1])
    return merge((*kept, (low, high + 1)))
