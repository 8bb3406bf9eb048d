"""What travels: work that may be sent, as pieces of tensors in contiguous host bytes, and what sizes them beforehand.

Knows no message and no socket.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from graphkv_proto import tensors

from graphkv.terms.shapes import EXTRA_ROLES, Shapes
from graphkv_client._arrays import Raw, as_float32, concatenated, dtype_name, host_view, wait_for
from graphkv_client._inputs import HEADED

__all__ = ["Form", "Part", "Piece", "Preparation", "Work", "piece_of", "wire_dtype"]


FLOAT32 = ("scores", *EXTRA_ROLES)
"""Roles that travel as float32, whatever was given."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of one layer, or a range of its tokens, ready to be cut into chunks.

    array: in host memory, its axes in the order of `layout`. start, count: which tokens (0, 0: not a range).
    """

    role: str
    dtype: str
    array: Raw
    layout: str
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Part:
    """Some or all tokens of a layer, from `start` on: arrays by role, heads first, and the event they are ready after."""

    start: int
    arrays: Mapping[str, Any]
    ready: Any = None

    @property
    def tokens(self) -> int:
        """How many tokens its keys have."""
        return int(self.arrays["keys"].shape[1])

    def pieces(self, roles: Collection[str]) -> list[Piece]:
        """Those of its arrays that have one of the roles, as they are. Waits for the event."""
        wait_for(self.ready, self.arrays["keys"])
        found = []
        for role, array in self.arrays.items():
            if role in roles:
                axis = tensors.TOKEN_AXIS.get(role)
                ranged = axis is not None and array.shape[axis] == self.tokens
                found.append(piece_of(role, array, start=self.start if ranged else 0))
        return found


@dataclass(frozen=True, slots=True)
class Work:
    """What may be sent next of one layer.

    ahead: parts whose arrays of these `roles` travel as they are. whole: all parts of a complete layer, where something
    is to be computed from it first. copied: bytes of our own copies that are free once this is sent.
    """

    prompt: int
    layer: int
    ahead: tuple[Part, ...]
    roles: tuple[str, ...]
    whole: tuple[Part, ...] = ()
    copied: int = 0

    def pieces(self, preparation: "Preparation") -> list[Piece]:
        """All of it, in the order it travels. May compute, and copy from a device; raises InvalidInputError."""
        found = [piece for part in self.ahead for piece in part.pieces(self.roles)]
        if self.whole:
            for part in self.whole:
                wait_for(part.ready, part.arrays["keys"])
            found += preparation.pieces(joined(self.whole), self.prompt, self.layer)
        return found


@dataclass(frozen=True, slots=True)
class Form:
    """What every layer of a call looks like but for its number of tokens: the sizes, and each role's dtype by name.

    `extra`: the last axis of similarity_keys; `position_rows`: Hkv where positions are [Hkv, n], else 1.
    """

    shapes: Shapes
    dtypes: Mapping[str, str]
    extra: int = 0
    position_rows: int = 1

    @classmethod
    def of(cls, arrays: Mapping[str, Any], shapes: Shapes) -> "Form":
        """The form of a layer's arrays (or of a chunk's, as far as they tell)."""
        dtypes = {role: wire_dtype(role, array) for role, array in arrays.items()}
        extra = int(arrays["similarity_keys"].shape[2]) if "similarity_keys" in arrays else 0
        rows = shapes.kv_heads if "positions" in arrays and arrays["positions"].ndim == 2 else 1
        return cls(shapes, dtypes, extra, rows)

    @property
    def caller_scores(self) -> bool:
        """Whether the importance is the caller's own."""
        return "scores" in self.dtypes

    def whole_bytes(self, role: str, tokens: int) -> int:
        """Bytes of the role in a layer of `tokens`."""
        shapes = self.shapes
        numbers = {
            "keys": shapes.kv_heads * tokens * shapes.head_dim,
            "queries": shapes.query_heads * shapes.window * shapes.head_dim,
            "attention": shapes.query_heads * shapes.window * tokens,
            "scores": shapes.kv_heads * tokens,
            "value_norms": shapes.kv_heads * tokens,
            "query_mean": shapes.query_heads * shapes.head_dim,
            "query_covariance": shapes.query_heads * shapes.head_dim**2,
            "similarity_keys": shapes.kv_heads * tokens * self.extra,
            "positions": self.position_rows * tokens,
        }
        return numbers[role] * tensors.item_size(self.dtypes[role])


class Preparation(Protocol):
    """How a layer's arrays become what is sent. `seconds`: time spent on it so far, by phase."""

    seconds: dict[str, float]
    computes: bool
    """Whether `pieces` gives anything."""

    def layer_bytes(self, form: Form, prompt: int, layer: int) -> int:
        """How many bytes a layer of this form sends, at most."""
        ...

    def ahead(self, given: Collection[str], prompt: int, layer: int) -> tuple[str, ...]:
        """The roles that travel as they were given, in ranges of tokens where they came so."""
        ...

    def pieces(self, arrays: Mapping[str, Any], prompt: int, layer: int) -> list[Piece]:
        """What travels besides, computed from a whole layer."""
        ...


def joined(parts: Sequence[Part]) -> Mapping[str, Any]:
    """The arrays of a whole layer, from its parts in any order; one that came whole stays as it is."""
    if len(parts) == 1:
        return parts[0].arrays
    in_order = sorted(parts, key=lambda part: part.start)
    arrays = {}
    for role in {role: None for part in in_order for role in part.arrays}:
        pieces = [part.arrays[role] for part in in_order if role in part.arrays]
        arrays[role] = pieces[0] if len(pieces) == 1 else concatenated(pieces, tensors.TOKEN_AXIS[role])
    return arrays


def wire_dtype(role: str, array: Any) -> str:
    """The name of the dtype that the role's array travels as."""
    return "f32" if role in FLOAT32 else dtype_name(role, array)


def piece_of(role: str, array: Any, *, start: int = 0, ranged: bool = True) -> Piece:
    """The array (numpy or torch, heads first) as it travels; tokens from `start` on.

    Heads first or tokens first, whichever the memory is in; other strides are copied chunk by chunk. Scores and
    what else is in FLOAT32 travel as that. `ranged`: False where the token axis is not the prompt's (candidates).
    """
    raw, dtype = host_view(role, as_float32(array) if role in FLOAT32 else array)
    layout = "HND"
    if role in HEADED and not raw.flags.c_contiguous:
        turned = raw.swapaxes(0, 1)
        if turned.flags.c_contiguous:
            raw, layout = turned, "NHD"
    axis = tensors.TOKEN_AXIS.get(role) if ranged else None
    return Piece(role, dtype, raw, layout, start, int(array.shape[axis]) if axis is not None else 0)
