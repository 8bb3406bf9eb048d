"""What a call answers: the tokens to keep, layer by layer, and what it took to find them.

Arrays are whatever kind the caller gave (numpy or torch); nothing here computes with them beyond `dropped`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graphkv.terms.errors import Reason, invalid
from graphkv.terms.policy import Policy

__all__ = ["LayerSelection", "Selection", "Summary"]


@dataclass(frozen=True, slots=True)
class LayerSelection:
    """The tokens one layer of one prompt keeps.

    indices: int32 [Hkv, B], ascending, slots of the keys that were given; numpy or torch as the input was, on its
    device. Where KV heads keep different numbers (scores of -inf, "adaptive_heads"), a list of Hkv int32 arrays instead.
    Where they share an answer (`granularity` "layer", or "model", whose one answer has layer 0), int32 [B].
    page_size: None where the indices are tokens; else they are ids of pages of so many tokens.
    num_tokens: n of the keys the indices are for. fingerprint: of the policy. Both are the fence: see `check`.
    kept_score_ratio: the share of the base score's mass that is kept, in [0, 1].
    changed: how many kept tokens the same policy without a graph would not have kept, summed over the layer's KV heads.
    importance: the scorer that ran, or "scores" where the caller's own were used. exact: nothing was rounded on the way.
    outputs: what was asked for besides, by name (`graphkv.terms.catalogue.OUTPUTS`); arrays of the same kind, without the
    axis of KV heads where heads share an answer.
    """

    layer: int
    indices: Any
    num_tokens: int
    kept_score_ratio: float
    changed: int
    importance: str
    fingerprint: str
    prompt: int = 0
    exact: bool = True
    granularity: str = "head"
    page_size: int | None = None
    outputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[Any]:
        """The indices, one array a KV head; one alone where heads share an answer."""
        return list(self.indices) if self.granularity == "head" else [self.indices]

    def kept_ranges(self) -> list[list[tuple[int, int]]]:
        """The tokens kept, as ascending ranges (start, stop) that do not touch; one list a row of `rows`."""
        size = self.page_size or 1
        found = []
        for row in self.rows:
            ranges: list[tuple[int, int]] = []
            for place in row.tolist():
                start, stop = place * size, min((place + 1) * size, self.num_tokens)
                if ranges and ranges[-1][1] == start:
                    start = ranges.pop()[0]
                ranges.append((start, stop))
            found.append(ranges)
        return found

    def check(self, *, num_tokens: int, policy: Policy | None = None) -> None:
        """Raises InvalidInputError (FINGERPRINT) unless this answers a cache of `num_tokens` (and this `policy`)."""
        if num_tokens != self.num_tokens:
            raise invalid(
                "num_tokens", num_tokens, f"{self.num_tokens}, which this selection is for", reason=Reason.FINGERPRINT
            )
        if policy is not None and policy.fingerprint != self.fingerprint:
            allowed = f"the one this selection is for, {self.fingerprint}"
            raise invalid("policy", policy.fingerprint, allowed, reason=Reason.FINGERPRINT)

    def dropped(self) -> list[list[tuple[int, int]]]:
        """The tokens not kept, as ascending ranges (start, stop), one list a row of `rows`."""
        found = []
        for ranges in self.kept_ranges():
            edges = [0, *(edge for kept in ranges for edge in kept), self.num_tokens]
            gaps = zip(edges[::2], edges[1::2], strict=True)
            found.append([(start, stop) for start, stop in gaps if start < stop])
        return found

    def moves(self, to: Literal["front", "tail"] = "front") -> list[list[tuple[int, int]]]:
        """What closes the gaps in place: (source, destination) slots of tokens, one list a row of `rows`; tokens that stay
        are left out.

        "front": the kept tokens end up in slots 0, 1, ..., destination <= source, ascending. "tail": in the last slots,
        destination >= source, descending. Applied in their order no move overwrites a token that is still to be moved.
        What is left is as long as the row keeps tokens; positions stay those of the prompt.
        Raises InvalidInputError for another `to`.
        """
        if to not in ("front", "tail"):
            raise invalid("to", to, '"front" or "tail"')
        found = []
        for ranges in self.kept_ranges():
            kept = [token for start, stop in ranges for token in range(start, stop)]
            first = 0 if to == "front" else self.num_tokens - len(kept)
            pairs = [(source, first + place) for place, source in enumerate(kept) if source != first + place]
            found.append(pairs if to == "front" else pairs[::-1])
        return found


@dataclass(frozen=True, slots=True)
class Summary:
    """What a call took.

    sent_bytes: tensor bytes that travelled to the service (0 in-process). encoding: how numbers were written.
    transport: "in_process", "tcp". where: the replica that answered, or "local"; "kept_all" where none did and the client
    was told to keep everything then. attempts: how often the call was sent (0 in-process). seconds: by phase, e.g.
    "compute".
    """

    request_id: str = ""
    sent_bytes: int = 0
    encoding: str = "exact"
    transport: str = "in_process"
    where: str = "local"
    attempts: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Selection:
    """The answer for one prompt: `indices[layer]` is int32 [Hkv, B], ascending.

    With granularity "model" there is one answer for all layers: `layers` and `indices` have one entry.
    """

    layers: tuple[LayerSelection, ...]
    summary: Summary = field(default_factory=Summary)

    @property
    def indices(self) -> list[Any]:
        """One entry a layer; see `LayerSelection.indices`. Layers may differ in B (pyramid budgets)."""
        return [layer.indices for layer in self.layers]

    @property
    def num_tokens(self) -> int:
        """n of the keys the indices are for."""
        return self.layers[0].num_tokens

    @property
    def kept_score_ratio(self) -> list[float]:
        """The share of the base score's mass that is kept, per layer."""
        return [layer.kept_score_ratio for layer in self.layers]

    @property
    def changed(self) -> list[int]:
        """How many kept tokens the graph changed, per layer."""
        return [layer.changed for layer in self.layers]

    @property
    def exact(self) -> bool:
        """Whether nothing was rounded on the way."""
        return all(layer.exact for layer in self.layers)

    def check(self, *, num_tokens: int, policy: Policy | None = None) -> None:
        """The fence: raises InvalidInputError (FINGERPRINT) unless this answers a cache of `num_tokens` (and `policy`)."""
        for layer in self.layers:
            layer.check(num_tokens=num_tokens, policy=policy)

    def __iter__(self) -> Iterator[LayerSelection]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)
