"""Everything a policy can name, and what each needs: the one table that the caller, the wire and the algorithm share.

A new scorer is one file in `graphkv/scorers/` and one line here; tests walk these tables, so what is new is tested
without editing a test. Knows no tensor and no formula.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = [
    "BUDGETS",
    "COMBINES",
    "GRANULARITIES",
    "OPTIONS",
    "OUTPUTS",
    "POOLINGS",
    "SCORERS",
    "SIGNALS",
    "SIMILARITIES",
    "UPDATES",
    "OptionTerms",
    "ScorerTerms",
]


@dataclass(frozen=True, slots=True)
class ScorerTerms:
    """What a policy has to know of a scorer without running it.

    `window`: the default observation window (tokens). `query_rows`: which queries (or rows of attention) it needs: none
    (""), those of the observation "window", those of "all" tokens, or "any" number of last ones. `reads_keys`: it reads
    the keys of every token (with attention given, no scorer does). `needs`: further inputs it cannot do without.
    `pool_width`: the default width of the pooling, or None where it does not pool. `sinks`: the default number of first
    tokens that are always kept.
    """

    summary: str
    source: str
    window: int = 0
    query_rows: Literal["", "window", "all", "any"] = ""
    reads_keys: bool = True
    needs: tuple[str, ...] = ()
    pool_width: int | None = None
    sinks: int = 0

    @property
    def reads_attention(self) -> bool:
        """Whether it needs `queries=` or `attention=`."""
        return self.query_rows != ""

    @property
    def least_window(self) -> int:
        """The least observation window: at least the last token where the scorer looks from there."""
        return 1 if self.window else 0


@dataclass(frozen=True, slots=True)
class OptionTerms:
    """A setting of one scorer or budget allocation: whose it is, what it is by default, and the numbers it may be.

    `of`: the field of Policy and the name there that it goes with.
    """

    of: tuple[Literal["scorer", "budget_allocation"], str]
    default: float
    least: float
    most: float
    allowed: str


SCORERS: Mapping[str, ScorerTerms] = MappingProxyType({
    "snapkv": ScorerTerms("attention received from the end of the prompt, pooled", "arXiv:2404.14469",
                          window=32, query_rows="window", pool_width=7),
    "h2o": ScorerTerms("attention received from all tokens", "arXiv:2306.14048", query_rows="all"),
    "tova": ScorerTerms("attention received from the last token", "arXiv:2401.06104", window=1, query_rows="any"),
    "knorm": ScorerTerms("tokens whose keys are short", "arXiv:2406.11430"),
    "keydiff": ScorerTerms("tokens whose keys differ from the mean key", "arXiv:2504.15364"),
    "expected_attention": ScorerTerms("attention expected from queries to come, times the value's norm", "arXiv:2510.00636",
                                      needs=("query_mean", "query_covariance", "value_norms"), sinks=4),
    "cake": ScorerTerms("mean and variance of the attention received from the end of the prompt, pooled", "arXiv:2503.12491",
                        window=32, query_rows="window", pool_width=5),
    "given": ScorerTerms("the caller's own scores", "the caller", reads_keys=False),
})  # fmt: skip
BUDGETS: Mapping[str, str] = MappingProxyType({
    "uniform": "the same budget in every layer and head",
    "pyramid": "more in the first layers than in the last (PyramidKV, arXiv:2406.02069)",
    "cake": "more where attention is spread and wavers (CAKE, arXiv:2503.12491); waits for all layers",
    "adaptive_heads": "the heads of a layer share its budget (AdaKV, arXiv:2407.11550); ragged answers",
})  # fmt: skip
SIGNALS: Mapping[str, str] = MappingProxyType({
    "decay": "a source lowers its neighbors",
    "enhance": "a source raises its neighbors",
    "evict": "a source sends its neighbors below every other token",
})  # fmt: skip
UPDATES: Mapping[str, str] = MappingProxyType({
    "product": "factors of several sources multiply (the paper's equation)",
    "additive": "signals of several sources add up (the paper's figure)",
    "sequential": "every token becomes a source the moment it is kept",
})  # fmt: skip
SIMILARITIES: Mapping[str, str] = MappingProxyType({
    "post_rope": "the keys as they lie in the cache",
    "pre_rope": "the keys before rotary embedding; needs rope= or similarity_keys=",
})  # fmt: skip
GRANULARITIES: Mapping[str, str] = MappingProxyType({
    "head": "every KV head keeps tokens of its own",
    "layer": "the KV heads of a layer share one set",
    "model": "all layers share one set; waits for all layers",
})  # fmt: skip
COMBINES: Mapping[str, str] = MappingProxyType({
    "mean": "the mean of the scores that meet in one answer",
    "max": "the largest of them",
})  # fmt: skip
# The taus are the CAKE authors' own for Llama 3.1 8B at 128 tokens a layer; theirs differ from model to model.
OPTIONS: Mapping[str, OptionTerms] = MappingProxyType({
    "gamma": OptionTerms(("scorer", "cake"), 200.0, 0.0, 1e30, "a number >= 0"),
    "tau1": OptionTerms(("budget_allocation", "cake"), 1.6, 1e-3, 1e30, "a number >= 0.001"),
    "tau2": OptionTerms(("budget_allocation", "cake"), 0.6, 1e-3, 1e30, "a number >= 0.001"),
    "alpha": OptionTerms(("budget_allocation", "adaptive_heads"), 0.2, 0.0, 1.0, "a number in [0, 1]"),
})  # fmt: skip
OUTPUTS: Mapping[str, str] = MappingProxyType({
    "updated_scores": "float32 [Hkv, n], after the graph; +inf where a token is always kept, -inf for padding",
    "keep_mask": "bool [Hkv, n], True for a kept token",
    "decay_factors": "float32 [Hkv, n], what the graph multiplied each score with; 1 where it did nothing, 0 for evicted",
    "choice_order": "int32 [Hkv, B - A], the kept contenders in the order they were chosen (sequential), then -1",
    "dropped_ranges": "int32 [ranges, 3], KV head, start and stop of the tokens not kept",
    "moves": "int32 [moves, 3], KV head, source and destination that close the gaps from the front",
})  # fmt: skip
POOLINGS: Mapping[str, str] = MappingProxyType({"avg": "the mean, padded with zeros", "max": "the largest"})
