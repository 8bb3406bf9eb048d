"""The six ways to keep a budget's worth of a cache, side by side, and what each of them is measured by."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graphkv_client import Policy

from main_job.words import Difference


@dataclass(frozen=True, slots=True)
class Method:
    """policy: of the budget, for what the service chooses; None for what needs no choosing."""

    name: str
    policy: Callable[[Any], Policy] | None = None


FULL = Method("Full cache")
LAST = Method("Last tokens only")
SNAPKV = Method("SnapKV", Policy.snapkv)
METHODS = (
    FULL,
    LAST,
    SNAPKV,
    Method("GraphKV paper", Policy.paper),
    Method("GraphKV default", Policy),
    Method("GraphKV sequential", Policy.sequential),
)


@dataclass(slots=True)
class Result:
    """What became of one method.

    kept_tokens: per layer and KV head. kept_bytes: of keys and values, all layers. sent_bytes: to the service.
    seconds: by step; scoring runs in the client and choosing in the service while the prefill runs, summed over layers;
    ready: from the end of the prefill to the cut cache. text_loss: nats a token of the text that follows the prompt;
    answer_loss: of the full cache's own answers; None where there is nothing to measure. answers: one a question.
    """

    method: Method
    kept_tokens: int
    kept_bytes: int
    sent_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    text_loss: float | None = None
    answer_loss: float | None = None
    answers: list[str] = field(default_factory=list)
    right: list[bool | None] = field(default_factory=list)
    kept_score_ratio: float | None = None
    difference: Difference | None = None
