"""Everything a policy can name, and what each needs: the one table that the caller, the wire and the algorithm share.

A new scorer is one file in `graphkv/scorers/` and one line here; tests walk these tables, so what is new is tested
without editing a test. Knows no tensor and no formula.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["BUDGETS", "GRANULARITIES", "POOLINGS", "SCORERS", "SIGNALS", "SIMILARITIES", "UPDATES", "ScorerTerms"]


@dataclass(frozen=True, slots=True)
class ScorerTerms:
    """What a policy has to know of a scorer without running it.

    `window`: the default observation window (tokens). `reads_attention`: it needs `queries=` or `attention=`.
    `reads_keys`: it reads the keys of every token. `pool_width`: the default width of the pooling, or None where it
    does not pool. `sinks`: the default number of first tokens that are always kept.
    """

    summary: str
    source: str
    window: int = 0
    reads_attention: bool = False
    reads_keys: bool = True
    pool_width: int | None = None
    sinks: int = 0


SCORERS: Mapping[str, ScorerTerms] = MappingProxyType({
    "snapkv": ScorerTerms("attention received from the end of the prompt, pooled", "arXiv:2404.14469",
                          window=32, reads_attention=True, pool_width=7),
    "knorm": ScorerTerms("tokens whose keys are short", "arXiv:2406.11430"),
    "given": ScorerTerms("the caller's own scores", "the caller", reads_keys=False),
})  # fmt: skip
BUDGETS: Mapping[str, str] = MappingProxyType({
    "uniform": "the same budget in every layer and head",
    "pyramid": "more in the first layers than in the last (PyramidKV, arXiv:2406.02069)",
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
GRANULARITIES: Mapping[str, str] = MappingProxyType({"head": "every KV head keeps tokens of its own"})
POOLINGS: Mapping[str, str] = MappingProxyType({"avg": "the mean, padded with zeros", "max": "the largest"})
