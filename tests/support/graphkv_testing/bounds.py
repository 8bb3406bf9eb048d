"""How far float32 arithmetic may be from the reference: an interval for every score, cosine, factor and log factor.

With u = 2^-24 (half an ulp of 1) a sum of k products in float32, in any order, is off by at most k u times the sum of
their absolute values; rounding errors being as good as independent, 4 sqrt(k) u holds with probability above 1 - 1e-3 for
every single sum and is far from reached (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis").
`gamma(k)` is the smaller of the two. From it, and nothing looser:

- attention received: all terms are positive, so the error is relative: the mean over w, pooling and the mean over the
  group add gamma(w) + gamma(width) + gamma(group) + 4u. From queries, logits are off by (gamma(d) + 4u) * max sum |q k| /
  sqrt(d), which enters a softmax twice (the token's own term and the denominator), plus u * the range of the logits, 3u for
  exp and the division and gamma(n) for the denominator.
- cake's variances add up squares of differences of weights: what their error is in proportion to is larger than they are
  (`Importance.terms`). h2o and tova: as above, without pooling. expected_attention: the same, its logits being sums of d^2.
- keydiff: gamma(n) + 2 gamma(d) + 6u of the terms of the cosine with the mean key, whose own error counts by its length.
- knorm: gamma(d) / 2 + 2u, relative. The caller's scores are exact; a shift adds one rounding of its result.
- a cosine: gamma(d) * sum |a b| / (|a| |b|) for the dot product, (gamma(d) + 6u) * |cos| for the two norms and divisions,
  u for a threshold that is not a float32. Unrotating costs each of two vectors 3u (a sum of two products, and its
  rounding): the angles themselves are to be taken in float64, float32's are off by 1/100 at position 100,000.
- a factor 1 - strength * e: strength times the cosine's error, plus 2u strength e + u for the rounding.
- its logarithm: the same divided by the factor, plus 2u of itself; each addition to x adds u |x|.

Products of factors underflow: a nonzero result below 2^-126 may be anything from 0 to there.
"""

import math
from dataclasses import dataclass

import numpy as np

from graphkv_testing.graph_steps import LARGEST, SNAP
from graphkv_testing.states import LayerState, RowState

__all__ = ["LARGEST", "TINY", "UNIT", "Edges", "Scores", "attention_error", "edge_bounds", "gamma", "logs", "score_bounds"]

UNIT = 2.0**-24
TINY = 2.0**-126


def gamma(count: float) -> float:
    """The error of a sum of `count` products, relative to the sum of their absolute values."""
    return min(count, 4.0 * math.sqrt(count)) * UNIT


@dataclass
class Scores:
    """Base scores of one row as intervals [n]: raw as the scorer gives them, and after the shift of step 1.

    equal: [n] floats; where it is not None, tokens with the same entry have bit-equal scores in any arithmetic.
    """

    raw: tuple[np.ndarray, np.ndarray]
    shifted: tuple[np.ndarray, np.ndarray]
    equal: np.ndarray | None

    def before(self, tokens: list[int]) -> np.ndarray:
        """[i, j] true where tokens[i] certainly ranks before tokens[j]: by score, or in an exact tie by index.

        An implementation may rank before or after the shift, so what either leaves open is open.
        """
        ids = np.array(tokens, dtype=int)
        certain = np.ones((len(ids), len(ids)), dtype=bool)
        for low, high in (self.raw, self.shifted):
            certain &= low[ids][:, None] > high[ids][None, :]
        return certain | (self.tied(ids) & (ids[:, None] < ids[None, :]))

    def tied(self, ids: np.ndarray) -> np.ndarray:
        """[i, j] true where two tokens' scores are equal in any arithmetic."""
        low, high = self.raw[0][ids], self.raw[1][ids]
        exact = low == high
        tied = exact[:, None] & exact[None, :] & (low[:, None] == low[None, :])
        if self.equal is not None:
            tied |= self.equal[ids][:, None] == self.equal[ids][None, :]
        return tied


def score_bounds(state: LayerState, row: RowState, *, exact_ties: bool = False) -> Scores:
    """`exact_ties`: also hold an implementation to ties of scores that it computes (bit-equal in the reference)."""
    origin, head = state.importance, row.head
    base = np.where(np.isfinite(row.base), row.base, 0.0)  # the others are no contenders
    terms = np.abs(base) if origin.terms is None else origin.terms[head]
    relative = _relative(state, row.num_tokens)
    error = relative * terms
    raw = (base - error, base + error)
    shifted = raw
    lowest = min(row.contenders, key=lambda j: base[j], default=None)
    if lowest is not None and base[lowest] < 0:
        result = base - base[lowest]
        wide = UNIT * np.abs(result) + error + error[lowest]
        alone = sum(raw[0][j] <= raw[1][lowest] for j in row.contenders) == 1
        if alone or relative == 0:
            wide[result == 0] = 0.0  # no other can be the smallest: s - s is exactly 0
        shifted = (np.maximum(result - wide, 0.0), result + wide)
    return Scores(raw, shifted, row.base if exact_ties or origin.equal in ("all", "row") else None)


def _relative(state: LayerState, num_tokens: int) -> float:
    """The error of a score relative to what its terms add up to (`Importance.terms`)."""
    origin = state.importance
    if origin.scorer == "scores":
        return 0.0
    if origin.scorer == "knorm":
        return gamma(state.head_dim) / 2 + 2 * UNIT
    if origin.scorer == "keydiff":
        return gamma(num_tokens) + 2 * gamma(state.head_dim) + 6 * UNIT
    relative = gamma(origin.rows) + gamma(origin.pool_width) + gamma(origin.group) + 4 * UNIT
    return relative + attention_error(state, num_tokens)


def attention_error(state: LayerState, num_tokens: int) -> float:
    """The relative error of every weight of the attention that a layer's scorer, or its budget, looks at."""
    logits = state.importance.logits
    if state.importance.source != "queries":
        return 0.0
    return 2 * (gamma(state.head_dim) + 5 * UNIT) * logits + 3 * UNIT + gamma(num_tokens)


@dataclass
class Edges:
    """Cosines of one row as intervals [n, n], clamped and snapped, and what is certain about each pair.

    low, high: the counted cosine. surely, maybe: it certainly (possibly) is above 0 and reaches the threshold.
    """

    low: np.ndarray
    high: np.ndarray
    surely: np.ndarray
    maybe: np.ndarray

    def factors(self, strength: float, sign: float) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of 1 + sign * strength * e [n, n], in float32."""
        at_low, at_high = 1.0 + sign * strength * self.low, 1.0 + sign * strength * self.high
        wide = 2 * UNIT * strength * self.high + UNIT
        # Below the snap 1 - e is exact, so at full strength it is one of float32's numbers from 2^-16 on.
        least = np.where((strength == 1.0) & (self.high < 1.0), 2.0**-16, 0.0)
        low = np.maximum(np.minimum(at_low, at_high) - wide, least)
        high = np.minimum(np.maximum(at_low, at_high) + wide, 1.0 if sign < 0 else math.inf)
        exact = (self.high == 0.0) | ((self.low == 1.0) & (strength == 1.0))  # nothing is rounded
        return np.where(exact, at_high, low), np.where(exact, at_high, high)

    def log_factors(self, strength: float) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of ln(1 - strength * e) [n, n], in float32."""
        low, high = (logs(bound) for bound in self.factors(strength, -1.0))
        return low * (1 + 2 * UNIT), high * (1 - 2 * UNIT)


def edge_bounds(state: LayerState, row: RowState, *, threshold: float) -> Edges:
    """The cosines of a row that ran the graph."""
    cosine, absolute = row.cosine, row.absolute
    relative = gamma(state.vector_dim)
    error = relative * absolute + (relative + 6 * UNIT) * np.abs(cosine)
    if state.unrotated:
        error = error + 6 * UNIT * (absolute > 0)
    low, high = cosine - error, cosine + error
    counted_low = np.where(low >= SNAP, 1.0, np.clip(low, 0.0, 1.0))
    counted_high = np.where(high >= SNAP, 1.0, np.clip(high, 0.0, 1.0))
    slack = 0.0 if threshold == 1.0 else UNIT * threshold
    surely = (counted_low > 0) & (counted_low >= threshold + slack)
    maybe = (counted_high > 0) & (counted_high >= threshold - slack)
    return Edges(counted_low, counted_high, surely, maybe)


def logs(values: np.ndarray) -> np.ndarray:
    """The natural logarithm, -inf at 0, silently."""
    with np.errstate(divide="ignore"):
        return np.log(values)
