"""Shapes: the one shape check of a call, for the library, the client and the server alike.

Takes dims as tuples of ints; knows no array library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphkv.terms.errors import Reason, invalid

__all__ = ["EXTRA_ROLES", "IMPORTANCE_ROLES", "Shapes"]

IMPORTANCE_ROLES = ("queries", "attention", "scores")
EXTRA_ROLES = ("value_norms", "query_mean", "query_covariance")
_AXES = {
    "keys": "[Hkv, n, d]",
    "queries": "[Hq, w, d]",
    "attention": "[Hq, w, n]",
    "scores": "[Hkv, n]",
    "similarity_keys": "[Hkv, n, any]",
    "positions": "[n] or [Hkv, n]",
    "value_norms": "[Hkv, n]",
    "query_mean": "[Hq, d]",
    "query_covariance": "[Hq, d, d]",
}


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes of one prompt's call: `layers` L, `query_heads` Hq, `kv_heads` Hkv, `tokens` n, `head_dim` d, `window` w.

    `query_heads` and `window` are 0 where neither queries nor attention came; `window` is the number of query rows
    given, not the policy's. Raises InvalidInputError (reason BAD_SHAPE) naming the argument.
    """

    layers: int
    kv_heads: int
    tokens: int
    head_dim: int
    query_heads: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "tokens", "head_dim"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "an integer >= 1", reason=Reason.BAD_SHAPE)
        if self.query_heads % self.kv_heads:
            allowed = f"a multiple of the {self.kv_heads} KV heads"
            raise invalid("query_heads", self.query_heads, allowed, reason=Reason.BAD_SHAPE)

    @property
    def group(self) -> int:
        """Query heads per KV head; query head h belongs to KV head h // group."""
        return self.query_heads // self.kv_heads

    @classmethod
    def of_layer(cls, dims: Mapping[str, Sequence[int]], *, layers: int = 1, tokens: int | None = None) -> "Shapes":
        """The shapes of one layer's arrays, each checked against the keys': `dims` maps a role to its dims.

        `tokens` overrides n where the keys given are only part of the layer's.
        """
        keys = _ranked("keys", dims["keys"], (3,))
        source = next((role for role in IMPORTANCE_ROLES if role in dims), None)
        heads, window = 0, 0
        if source in ("queries", "attention"):
            heads, window = _ranked(source, dims[source], (3,))[:2]
        elif "query_mean" in dims:
            heads = _ranked("query_mean", dims["query_mean"], (2,))[0]
        elif "query_covariance" in dims:
            heads = _ranked("query_covariance", dims["query_covariance"], (3,))[0]
        shapes = cls(layers, keys[0], keys[1] if tokens is None else tokens, keys[2], heads, window)
        for role, given in dims.items():
            shapes.check(role, given)
        return shapes

    def check(self, role: str, given: Sequence[int]) -> None:
        """Raises InvalidInputError where `given` are not the dims of one layer's `role`."""
        dims = tuple(given)
        if role == "similarity_keys":
            ok = len(dims) == 3 and dims[:2] == (self.kv_heads, self.tokens) and dims[2] >= 1
        elif role == "positions":
            ok = dims in ((self.tokens,), (self.kv_heads, self.tokens))
        else:
            ok = dims == self.dims(role)
        if role in ("queries", "attention"):
            ok = ok and self.window > 0
        if role in ("queries", "attention", "query_mean", "query_covariance"):
            ok = ok and self.query_heads > 0
        if not ok:
            wanted = f"{_AXES[role]} with {self.describe()}"
            raise invalid(role, list(dims), wanted, reason=Reason.BAD_SHAPE)

    def dims(self, role: str) -> tuple[int, ...]:
        """The dims of one layer's `role`."""
        return {
            "keys": (self.kv_heads, self.tokens, self.head_dim),
            "queries": (self.query_heads, self.window, self.head_dim),
            "attention": (self.query_heads, self.window, self.tokens),
            "scores": (self.kv_heads, self.tokens),
            "value_norms": (self.kv_heads, self.tokens),
            "query_mean": (self.query_heads, self.head_dim),
            "query_covariance": (self.query_heads, self.head_dim, self.head_dim),
        }[role]

    def describe(self) -> str:
        """The sizes by their letters, for messages."""
        text = f"Hkv {self.kv_heads}, n {self.tokens}, d {self.head_dim}"
        return f"{text}, Hq {self.query_heads}, w {self.window}" if self.query_heads else text


def _ranked(role: str, dims: Sequence[int], ranks: tuple[int, ...]) -> tuple[Any, ...]:
    if len(dims) not in ranks:
        raise invalid(role, list(dims), _AXES[role], reason=Reason.BAD_SHAPE)
    return tuple(dims)
