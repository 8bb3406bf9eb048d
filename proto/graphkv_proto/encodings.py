"""How numbers are written for the wire: one table, a pair of functions each. Which tokens travel is not decided here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy.typing as npt

__all__ = ["ENCODINGS", "Encoding"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Encoding:
    """One way to write numbers.

    exact: decoding gives the same bits back. encode(array) gives the numbers to send and their scales, or None where they
    need none; decode(numbers, scales) is its reverse.
    """

    summary: str
    exact: bool
    encode: Callable[[Array], tuple[Array, Array | None]]
    decode: Callable[[Array, Array | None], Array]


def _unchanged(array: Array) -> tuple[Array, None]:
    return array, None


def _as_sent(numbers: Array, scales: Array | None) -> Array:
    return numbers


ENCODINGS: Mapping[str, Encoding] = MappingProxyType({
    "exact": Encoding("numbers as they are", True, _unchanged, _as_sent),
})  # fmt: skip
