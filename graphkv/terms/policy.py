"""Policy and Graph: which tokens to keep and how to choose them, as frozen values that are valid once constructed.

One class for the caller, the wire, the server and the algorithm. Standard library only; computes no score.
"""

import dataclasses
import hashlib
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graphkv.terms.catalogue import (
    BUDGETS,
    COMBINES,
    GRANULARITIES,
    OPTIONS,
    POOLINGS,
    SCORERS,
    SIGNALS,
    SIMILARITIES,
    UPDATES,
)
from graphkv.terms.errors import invalid, unknown_name

__all__ = ["Graph", "Policy"]

_WIDEST_POOL = 1023  # beyond any use, and pooling costs its width for every token
_FINGERPRINT_VERSION = "1:"  # a changed default needs a new prefix: answers are compared by it


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """How kept tokens lower (or raise) the scores of their look-alikes (GraphKV, arXiv:2509.00388).

    source_ratio: sources as a share of the budget, in [0, 1].
    neighbors: per source; "auto" = ceil(budget / sources), an int >= 1, or None = every one at or above `threshold`.
    threshold: the least cosine of a neighbor, in [0, 1]; must be > 0 where `neighbors` is None.
    candidates: only the best `candidates` x budget tokens take part (>= 1), or None = all of them.
    similarity: "post_rope" or "pre_rope" (needs `rope=` or `similarity_keys=` with the call).
    rounds: 0..64. strength: in [0, 1]; "evict" ignores it. signal: "decay", "enhance" or "evict".
    update: "product", "additive" (rounds 1 only) or "sequential" (decay only; ignores source_ratio, neighbors,
    threshold and rounds).
    Raises InvalidInputError naming the field, e.g. `graph.strength`.
    """

    source_ratio: float = 0.3
    neighbors: int | Literal["auto"] | None = None
    threshold: float = 0.9
    candidates: float | None = 4.0
    similarity: str = "post_rope"
    rounds: int = 1
    strength: float = 1.0
    signal: str = "decay"
    update: str = "product"

    def __post_init__(self) -> None:
        for name, table in (("similarity", SIMILARITIES), ("signal", SIGNALS), ("update", UPDATES)):
            _named(f"graph.{name}", getattr(self, name), table)
        for name in ("source_ratio", "threshold", "strength"):
            _set(self, name, _real(f"graph.{name}", getattr(self, name), 0.0, 1.0, "a number in [0, 1]"))
        if self.candidates is not None:
            allowed = "a number >= 1, or None for all"
            _set(self, "candidates", _real("graph.candidates", self.candidates, 1.0, math.inf, allowed))
        _set(self, "rounds", _whole("graph.rounds", self.rounds, 0, 64, "an integer from 0 to 64"))
        if self.neighbors is not None and self.neighbors != "auto":
            allowed = 'an integer >= 1, "auto", or None for every one at or above the threshold'
            _set(self, "neighbors", _whole("graph.neighbors", self.neighbors, 1, None, allowed))
        if self.update == "sequential":
            if self.signal != "decay":
                raise invalid("graph.signal", self.signal, '"decay" where update is "sequential"')
        elif self.neighbors is None and self.threshold == 0.0:
            raise invalid("graph.threshold", self.threshold, "> 0 where neighbors is None")
        if self.update == "additive" and self.rounds != 1:
            raise invalid("graph.rounds", self.rounds, '1 where update is "additive"')

    @property
    def propagates(self) -> bool:
        """Whether any score can change; where not, the answer is exactly the base method's."""
        if self.strength == 0.0 and self.signal != "evict":
            return False
        return self.update == "sequential" or (self.source_ratio > 0.0 and self.rounds > 0)

    def source_count(self, budget: int, at_most: int) -> int:
        """K: the best `source_ratio` x `budget` candidates, never more than `at_most` (B_sel, C and the contenders)."""
        if self.source_ratio == 0.0:
            return 0
        return min(max(1, math.floor(self.source_ratio * budget + 1e-9)), at_most)

    def neighbor_count(self, budget: int, sources: int) -> int | None:
        """m: how many neighbors a source has at most; None = no limit but the threshold."""
        return -(-budget // max(1, sources)) if self.neighbors == "auto" else self.neighbors

    def candidate_count(self, budget: int, contended: int) -> int | None:
        """C: how many of the best contenders take part; None = all. `contended` is B_sel, the least that makes sense."""
        if self.candidates is None:
            return None
        return max(contended, math.ceil(self.candidates * budget - 1e-9))


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """Which tokens each KV head keeps.

    budget: tokens kept per KV head and layer, always-kept ones included (int >= 1), or the share kept (float in
    (0, 1]); the type decides: 1 is one token, 1.0 is all of them.
    scorer, budget_allocation, granularity: names from `graphkv.terms.catalogue`.
    window: the observation window, the last tokens of the prompt, always kept; None = the scorer's own (snapkv 32).
    pool_width, pooling: the smoothing of scorers that smooth; None = the scorer's own (snapkv 7); odd; "avg" or "max".
    sinks: how many first tokens are always kept; None = the scorer's own.
    page_size: answer pages of this many tokens instead of tokens: floor(budget / page_size) of them, at least one.
    page_align: round each layer's budget up so that a whole number of pages of this many tokens is dropped. Not with
    page_size.
    combine: "mean" or "max": how scores meet where heads, layers or the tokens of a page share an answer.
    graph: the propagation on top of the scores, or None for the base method alone. Left out, a gentle Graph(strength=0.25):
    at full strength it lost more than it gained on one of two models (docs/quality.md).
    options: settings of the scorer or the budget allocation by name, as a mapping; kept as sorted pairs.
    Raises InvalidInputError naming the field, what was given and what is allowed.
    """

    budget: int | float
    scorer: str = "snapkv"
    budget_allocation: str = "uniform"
    window: int | None = None
    pool_width: int | None = None
    pooling: str = "avg"
    sinks: int | None = None
    granularity: str = "head"
    page_size: int | None = None
    page_align: int | None = None
    combine: str = "mean"
    graph: Graph | None = field(default_factory=lambda: Graph(strength=0.25))
    options: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        _set(self, "budget", _budget(self.budget))
        for name, table in _NAMED.items():
            _named(name, getattr(self, name), table)
        for name, least in (("window", SCORERS[self.scorer].least_window), ("sinks", 0), ("page_size", 1), ("page_align", 1)):
            if getattr(self, name) is not None:
                _set(self, name, _whole(name, getattr(self, name), least, None, f"an integer >= {least}, or None"))
        if self.pool_width is not None:
            allowed = f"an odd integer from 1 to {_WIDEST_POOL}, or None"
            _set(self, "pool_width", _whole("pool_width", self.pool_width, 1, _WIDEST_POOL, allowed))
            if self.pool_width % 2 == 0:
                raise invalid("pool_width", self.pool_width, allowed)
        if self.graph is not None and not isinstance(self.graph, Graph):
            raise invalid("graph", self.graph, "a Graph, or None for the base method alone")
        _set(self, "options", _options(self.options, self))
        self._check_together()

    def _check_together(self) -> None:
        """What each field allows alone and another forbids."""
        if self.page_size is not None and self.page_align is not None:
            raise invalid("page_align", self.page_align, "None where page_size is set")
        if self.granularity == "model" and self.budget_allocation != "uniform":
            raise invalid("budget_allocation", self.budget_allocation, '"uniform" where granularity is "model"')
        if self.budget_allocation == "adaptive_heads":
            allowed = 'where budget_allocation is "adaptive_heads"'
            if self.granularity != "head":
                raise invalid("granularity", self.granularity, f'"head" {allowed}')
            for name in ("page_size", "page_align"):
                if getattr(self, name) is not None:
                    raise invalid(name, getattr(self, name), f"None {allowed}")
        if self.budget_allocation == "cake":
            if self.scorer == "given":
                raise invalid(
                    "scorer", self.scorer, 'one that goes with queries or attention, which budget_allocation "cake" reads'
                )
            if self.observation_window() < 1:
                raise invalid("window", self.window, 'an integer >= 1 where budget_allocation is "cake"')
        if self.granularity != "head" and self.graph is not None and self.graph.signal == "evict":
            raise invalid("granularity", self.granularity, '"head" where graph.signal is "evict"')

    @classmethod
    def paper(cls, budget: int | float, *, rounds: int = 1, **fields: Any) -> "Policy":
        """GraphKV as published (arXiv:2509.00388): 0.3 x budget sources, among all tokens, no threshold, full strength."""
        return cls(budget, graph=Graph(neighbors="auto", threshold=0.0, candidates=None, rounds=rounds), **fields)

    @classmethod
    def sequential(cls, budget: int | float, *, strength: float = 0.1, **fields: Any) -> "Policy":
        """The setting that measured best on SnapKV (docs/algorithm.md): needs `rope=` or `similarity_keys=`."""
        graph = Graph(update="sequential", similarity="pre_rope", strength=strength, candidates=2.0)
        return cls(budget, graph=graph, **{"sinks": 4, **fields})

    @classmethod
    def snapkv(cls, budget: int | float, **fields: Any) -> "Policy":
        """SnapKV alone (arXiv:2404.14469), without a graph."""
        return cls(budget, graph=None, **fields)

    @classmethod
    def pyramidkv(cls, budget: int | float, **fields: Any) -> "Policy":
        """PyramidKV alone (arXiv:2406.02069): SnapKV's scores, a budget that falls from layer to layer, no graph."""
        return cls(budget, budget_allocation="pyramid", graph=None, **fields)

    def option(self, name: str) -> float:
        """An option's value: the given one, or the catalogue's."""
        return dict(self.options).get(name, OPTIONS[name].default)

    def tokens(self, num_tokens: int) -> int:
        """B for a prompt of `num_tokens`: the budget itself, or its share of the prompt (at least one token)."""
        if isinstance(self.budget, int):
            return self.budget
        return max(1, math.floor(self.budget * num_tokens + 1e-9))

    def observation_window(self, *, caller_scores: bool = False) -> int:
        """w: the last tokens, always kept. With the caller's own scores the scorer's default does not apply."""
        if self.window is not None:
            return self.window
        return 0 if caller_scores else SCORERS[self.scorer].window

    @property
    def effective_pool_width(self) -> int:
        """The width of the pooling, the scorer's own where `pool_width` is None; 1 where the scorer does not pool."""
        default = SCORERS[self.scorer].pool_width
        return 1 if default is None else self.pool_width or default

    @property
    def effective_sinks(self) -> int:
        """How many first tokens are always kept, the scorer's own where `sinks` is None."""
        return SCORERS[self.scorer].sinks if self.sinks is None else self.sinks

    @property
    def needs_all_layers(self) -> bool:
        """Whether no layer can be answered before all layers of its prompt are there."""
        return self.granularity == "model" or self.budget_allocation == "cake"

    @property
    def is_coarse(self) -> bool:
        """Whether heads, layers or the tokens of a page share an answer."""
        return self.granularity != "head" or self.page_size is not None

    @property
    def needs_rope(self) -> bool:
        """Whether a call must bring `rope=` or `similarity_keys=`."""
        return self.graph is not None and self.graph.propagates and self.graph.similarity == "pre_rope"

    def __eq__(self, other: object) -> bool:
        return self.fingerprint == other.fingerprint if isinstance(other, Policy) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that are equal exactly for equal policies; stable between releases.

        A setting written out and the same one left at its default are equal; one token (1) and all of them (1.0) are not.
        """
        changed = json.dumps(self._changed(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256((_FINGERPRINT_VERSION + changed).encode()).hexdigest()[:16]

    def _changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults; the budget, which has none, always; the graph by its own fields."""
        terms = SCORERS[self.scorer]
        usual = _defaults(Policy) | {"options": {}, "pool_width": terms.pool_width, "sinks": terms.sinks}
        options = {name: value for name, value in dict(self.options).items() if value != OPTIONS[name].default}
        given = self.to_dict() | {"options": options, "pool_width": self.effective_pool_width, "sinks": self.effective_sinks}
        if terms.pool_width is None:
            given["pool_width"] = None
        graph = given.pop("graph")
        changed = {name: value for name, value in given.items() if name not in usual or value != usual[name]}
        if graph is None:
            return {**changed, "graph": None}
        changed_graph = {name: value for name, value in graph.items() if value != _defaults(Graph)[name]}
        return {**changed, "graph": changed_graph} if changed_graph else changed

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; `Policy.from_dict` gives the same policy back."""
        return dataclasses.asdict(self) | {"options": dict(self.options)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Policy":
        """The policy of `to_dict`. A field it does not know, or a bad value, raises InvalidInputError naming it."""
        if not isinstance(fields, Mapping):
            raise invalid("policy", fields, "a mapping of field names to values")
        known = {entry.name for entry in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise unknown_name("policy field", name, known)
        if "budget" not in fields:
            raise invalid("budget", None, "given: tokens or the share kept")
        values = dict(fields)
        graph = values.get("graph")
        if isinstance(graph, Mapping):
            known = {entry.name for entry in dataclasses.fields(Graph)}
            for name in graph:
                if name not in known:
                    raise unknown_name("graph field", name, known)
            values["graph"] = Graph(**graph)
        return cls(**values)


def _defaults(kind: type) -> dict[str, Any]:
    return {entry.name: entry.default for entry in dataclasses.fields(kind) if entry.default is not dataclasses.MISSING}


def _set(target: object, name: str, value: object) -> None:
    object.__setattr__(target, name, value)  # frozen: only construction writes


_NAMED: Mapping[str, Mapping[str, object]] = {
    "scorer": SCORERS,
    "budget_allocation": BUDGETS,
    "granularity": GRANULARITIES,
    "pooling": POOLINGS,
    "combine": COMBINES,
}


def _options(given: object, policy: Policy) -> tuple[tuple[str, float], ...]:
    """Sorted pairs; each an option of the policy's scorer or budget allocation."""
    if not isinstance(given, Mapping | tuple):
        raise invalid("options", given, "a mapping of names to numbers")
    known = {name: terms for name, terms in OPTIONS.items() if getattr(policy, terms.of[0]) == terms.of[1]}
    options = []
    try:
        pairs = sorted(dict(given).items())
    except (TypeError, ValueError):
        raise invalid("options", given, "a mapping of names to numbers") from None
    for name, value in pairs:
        if name not in known:
            raise unknown_name("options", name, known or ("nothing: this policy has no options",))
        terms = known[name]
        options.append((name, _real(f"options.{name}", value, terms.least, terms.most, terms.allowed)))
    return tuple(options)


def _budget(given: object) -> int | float:
    allowed = "a positive integer (tokens) or a ratio in (0, 1] (the share kept)"
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise invalid("budget", given, allowed)
    if isinstance(given, numbers.Integral):
        return _whole("budget", given, 1, None, allowed)
    if 0.0 < float(given) <= 1.0:
        return float(given)
    raise invalid("budget", given, allowed)


def _whole(name: str, given: object, least: int, most: int | None, allowed: str) -> int:
    if isinstance(given, bool) or not isinstance(given, numbers.Integral):
        raise invalid(name, given, allowed)
    value = int(given)
    if value < least or (most is not None and value > most):
        raise invalid(name, given, allowed)
    return value


def _real(name: str, given: object, least: float, most: float, allowed: str) -> float:
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise invalid(name, given, allowed)
    value = float(given)
    if not (least <= value <= most and math.isfinite(value)):
        raise invalid(name, given, allowed)
    return value


def _named(argument: str, given: object, table: Mapping[str, object]) -> None:
    if not isinstance(given, str) or given not in table:
        raise unknown_name(argument, given, table)
