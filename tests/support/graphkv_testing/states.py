"""What the reference knows of a prompt after it has run: every number on the way to an answer, for the judge to look at.

Plain records; nothing here computes beyond a difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from graphkv.terms.policy import Policy
from graphkv_testing.importance import Importance

__all__ = ["Cake", "CoarseState", "GraphState", "LayerState", "Paging", "RowState", "Shared"]


@dataclass
class GraphState:
    """What the graph did to one row. Token ids throughout; matrices are [n, n] over all tokens.

    candidates, sources: best first. edges: cosines clamped and snapped. neighbours: one list a source, most similar
    first. evicted: set of token ids. updated: [n], NaN where a token is no candidate. factors: [n], what the score was
    multiplied with, 1 where nothing happened. order: contenders kept, in the order of choice (sequential), or best first.
    steps: sequential only, (token, x of every candidate before the choice). x: sequential only, of every candidate, at the
    moment it was chosen or at the end.
    """

    candidates: list[int]
    sources: list[int]
    edges: np.ndarray
    neighbours: list[list[int]]
    evicted: set[int]
    updated: np.ndarray
    factors: np.ndarray
    order: list[int]
    steps: list[tuple[int, dict[int, float]]] = field(default_factory=list)
    x: dict[int, float] = field(default_factory=dict)


@dataclass
class RowState:
    """One KV head of one layer.

    base: scores as the scorer gives them, float64 [n]. shifted: after step 1. cosine: raw cosines [n, n] (unclamped), or
    None where nothing propagates; absolute: the same with the absolute values of all products, for error bounds.
    kept: ascending, always-kept tokens included. base_kept: contenders that graph=None keeps.
    """

    layer: int
    head: int
    num_tokens: int
    budget: int
    always: list[int]
    contenders: list[int]
    base: np.ndarray
    shifted: np.ndarray
    kept: list[int]
    base_kept: list[int]
    cosine: np.ndarray | None = None
    absolute: np.ndarray | None = None
    graph: GraphState | None = None

    @property
    def contended(self) -> int:
        """B_sel = B - A."""
        return self.budget - len(self.always)

    @property
    def candidates(self) -> list[int]:
        """Those of the graph; without one, all contenders."""
        return self.contenders if self.graph is None else self.graph.candidates

    @property
    def values(self) -> np.ndarray:
        """[n]: what a token is worth where rows meet. Updated if it is a candidate, else its base score, shifted where the
        graph propagates; -inf for what does not contend."""
        values = np.full(self.num_tokens, -math.inf)
        own = self.base if self.graph is None else self.shifted
        values[self.contenders] = own[self.contenders]
        if self.graph is not None:
            values[self.graph.candidates] = self.graph.updated[self.graph.candidates]
        return values


@dataclass
class Cake:
    """How the budget "cake" was spread: H, V and weight of every layer, and what their error depends on.

    received: of every layer, the last w rows of attention on the tokens before the window, [Hq, w, n - w].
    """

    received: list[np.ndarray]
    entropy: list[float]
    variance: list[float]
    weights: list[float]
    exponents: tuple[float, float]
    contended: int
    most: int
    shares: list[int]


@dataclass
class LayerState:
    """One layer: its rows, its figures, and what the judge needs to know of the arithmetic behind them."""

    layer: int
    policy: Policy
    budget: int
    rows: list[RowState]
    importance: Importance
    keys: np.ndarray
    vector_dim: int
    unrotated: bool
    kept_score_ratio: float
    changed: int
    cake: Cake | None = None

    @property
    def head_dim(self) -> int:
        """d."""
        return int(self.keys.shape[-1])

    @property
    def num_tokens(self) -> int:
        """n."""
        return self.rows[0].num_tokens

    @property
    def keeps_all(self) -> bool:
        """n <= B: nothing competes."""
        return self.num_tokens <= self.budget


@dataclass
class Paging:
    """How many pages of how many tokens are kept, and which of them whatever their score."""

    size: int
    count: int
    always: list[int]


@dataclass
class Shared:
    """One row of a coarse answer: the rows that meet in it, and how its tokens or pages were chosen.

    members: in the order (layer, head), each with its layer. contenders: tokens that can be chosen. values, ties: [n], by
    which; -inf where a token is none. kept: tokens, ascending, those of whole pages where the answer is pages. units: what
    is answered, token ids or page ids. base_kept: the tokens that the base method keeps.
    """

    members: list[tuple[LayerState, RowState]]
    votes: bool
    contenders: list[int]
    values: np.ndarray
    ties: np.ndarray
    kept: list[int]
    units: list[int]
    base_kept: list[int]

    @property
    def first(self) -> RowState:
        """Any member: n, B and the always-kept tokens are the same in all."""
        return self.members[0][1]

    def counted(self, row: RowState) -> Sequence[int]:
        """The tokens that count for a member in the answer's figures."""
        return row.candidates if self.votes else row.contenders


@dataclass
class CoarseState:
    """An answer of the granularity layer or model, or of pages: `shared` has one entry a row of it."""

    layer: int
    layers: list[LayerState]
    shared: list[Shared]
    paging: Paging | None
    kept_score_ratio: float
    changed: int

    @property
    def policy(self) -> Policy:
        """Of all layers."""
        return self.layers[0].policy

    @property
    def budget(self) -> int:
        """B, in tokens."""
        return self.layers[0].budget

    @property
    def num_tokens(self) -> int:
        """n."""
        return self.layers[0].num_tokens

    @property
    def keeps_all(self) -> bool:
        """n <= B: nothing competes."""
        return self.layers[0].keeps_all

    @property
    def cake(self) -> Cake | None:
        """Of the prompt."""
        return self.layers[0].cake
