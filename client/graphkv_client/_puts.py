"""Put and Gathering: one put of a stream as it was read, and what came of one layer so far.

Knows which chunks fit together, nothing of what is sent when: that is the feed's.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from graphkv_proto.tensors import TOKEN_AXIS

from graphkv.terms.always_kept import Range
from graphkv.terms.errors import Reason, invalid
from graphkv.terms.shapes import Shapes
from graphkv_client._arrays import Answer, copied
from graphkv_client._pieces import Part

__all__ = ["Gathering", "Put"]


@dataclass(frozen=True, slots=True)
class Put:
    """One put, read and checked as far as it can be alone. `start`: None for a whole layer; `copied`: bytes, if copies."""

    prompt: int
    layer: int
    start: int | None
    arrays: Mapping[str, Any]
    answer: Answer
    copied: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens its keys have."""
        return int(self.arrays["keys"].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(int(array.nbytes) for array in self.arrays.values())

    def shapes(self, whole: int | None) -> Shapes:
        """The sizes of this chunk, its arrays checked against each other; sources may span the `whole` prompt instead."""
        dims = {role: tuple(array.shape) for role, array in self.arrays.items()}
        if len(dims["keys"]) == 3 and dims["keys"][1] == 0:
            raise invalid("keys", "0 tokens", "at least one token", reason=Reason.BAD_LAYOUT)
        for role in ("attention", "scores", "value_norms"):
            if role in dims and len(dims["keys"]) == 3 and dims[role][-1:] == (whole,):
                dims[role] = (*dims[role][:-1], dims["keys"][1])
        return Shapes.of_layer(dims)

    def copy(self) -> "Put":
        """The same with copies of the arrays, which the caller cannot change."""
        return replace(self, arrays={role: copied(array) for role, array in self.arrays.items()}, copied=self.nbytes)


class Gathering:
    """What came of one layer and has not all been queued. A put costs the same however many came before."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.came = 0  # tokens
        self.parts: list[Part] = []
        self.queued = 0  # parts[:queued] were
        self.copied = 0  # bytes of copies that were not queued yet
        self.copies = 0  # bytes of all its copies
        self.dims: dict[str, tuple[int, ...]] = {}  # of its roles, as if the parts were joined
        self.first: dict[str, Any] = {}  # of each role that came, the first of its arrays
        self._ranges: list[Range] = []  # that came, ascending; neighbours are one

    @property
    def complete(self) -> bool:
        """Whether all tokens came."""
        return self.came == self.tokens

    def joined(self, arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The dims of its roles with these arrays; raises InvalidInputError where they do not fit what came."""
        return self.dims | {role: _joined(role, self.dims.get(role), tuple(array.shape)) for role, array in arrays.items()}

    def forget(self) -> None:
        """Drops the parts that were queued: they are neither sent again nor computed with."""
        del self.parts[: self.queued]
        self.queued = 0

    def overlapped(self, start: int, stop: int) -> Range | None:
        """A range that came before and shares tokens with this one, or None."""
        place = bisect_left(self._ranges, (start, start))
        near = self._ranges[max(0, place - 1) : place + 1]
        return next((one for one in near if start < one[1] and one[0] < stop), None)

    def add(self, part: Part, dims: dict[str, tuple[int, ...]]) -> None:
        """Takes a part that fits; `dims`: what `joined` said of it."""
        self.parts.append(part)
        self.came += part.tokens
        self.dims = dims
        self.first = {**part.arrays, **self.first}
        start, stop = part.start, part.start + part.tokens
        place = bisect_left(self._ranges, (start, stop))
        if place and self._ranges[place - 1][1] == start:
            place -= 1
            start = self._ranges.pop(place)[0]
        if place < len(self._ranges) and self._ranges[place][0] == stop:
            stop = self._ranges.pop(place)[1]
        self._ranges.insert(place, (start, stop))


def _joined(role: str, before: tuple[int, ...] | None, given: tuple[int, ...]) -> tuple[int, ...]:
    """The dims of a role after another chunk of it."""
    axis = TOKEN_AXIS.get(role)
    if before is None:
        return given
    if axis is None:
        raise invalid(role, "given twice", "given once for each layer", reason=Reason.BAD_LAYOUT)
    if given and len(before) == len(given):
        place = axis % len(given)
        if (*before[:place], *before[place + 1 :]) == (*given[:place], *given[place + 1 :]):
            return (*given[:place], before[place] + given[place], *given[place + 1 :])
    raise invalid(role, list(given), f"of the sizes of the chunk before, {list(before)}", reason=Reason.BAD_SHAPE)
