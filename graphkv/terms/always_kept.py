"""Which tokens are kept whatever their score: pinned ranges, sinks and the observation window. Integers only."""

from collections.abc import Sequence

from graphkv.terms.errors import Reason, invalid

__all__ = ["always_kept", "always_kept_pages", "check_pinned", "count", "merge"]

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


def always_kept_pages(
    num_tokens: int, pages: int, page_size: int, *, pinned: Sequence[Range] = (), sinks: int = 0, window: int = 0
) -> tuple[Range, ...]:
    """The pages that are kept whatever their score, as disjoint, ascending ranges of their ids: those with an always-kept
    token, and the last partial one.

    If that is more than `pages`: those with pinned tokens first, then with the sinks from the front, the window from the
    end, and the last partial page. Raises InvalidInputError where those with pinned tokens alone are more.
    """
    whole = -(-num_tokens // page_size)
    kept = merge([(start // page_size, (stop - 1) // page_size + 1) for start, stop in pinned])
    if count(kept) > pages:
        raise invalid("pinned", f"tokens of {count(kept)} pages", f"of at most {pages} pages, the budget")
    first = min(sinks, num_tokens)
    kept = _fill(kept, range(-(-first // page_size)), pages)
    if window > 0:
        start = (num_tokens - min(window, num_tokens)) // page_size
        kept = _fill(kept, range(whole - 1, start - 1, -1), pages)
    if num_tokens % page_size:
        kept = _fill(kept, range(whole - 1, whole - 2, -1), pages)
    return kept


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
    """Adds `tokens`, in their order, as long as the budget lasts; those already kept cost nothing.

    Works on ranges alone: a header may name a window of a billion tokens.
    """
    if not tokens:
        return kept
    room = budget - count(kept)
    low, high = min(tokens[0], tokens[-1]), max(tokens[0], tokens[-1]) + 1
    inside = [(max(start, low), min(stop, high)) for start, stop in kept if start < high and stop > low]
    bounds = [low, *(edge for pair in inside for edge in pair), high]
    gaps = [(start, stop) for start, stop in zip(bounds[::2], bounds[1::2], strict=True) if start < stop]
    added = []
    for start, stop in gaps if tokens.step > 0 else reversed(gaps):
        size = min(stop - start, room)
        added.append((start, start + size) if tokens.step > 0 else (stop - size, stop))
        room -= size
    return merge((*kept, *added))
