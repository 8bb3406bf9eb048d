"""How many tokens each layer keeps, and which of them whatever their score: a call's plan, in pure integers.

`plan_layers` turns a policy and a prompt's length into one LayerPlan a layer; the client, the server and the algorithm
all work from it, so that they never disagree about a size. Knows no tensor.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from graphkv.terms.always_kept import Range, always_kept, check_pinned, count
from graphkv.terms.policy import Policy

__all__ = ["LayerPlan", "plan_layers"]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer of one prompt is to keep.

    budget: B of this layer. always: the always-kept tokens, disjoint ascending ranges (start, stop). caller_scores:
    whether the importance is the caller's own (`scores=`), which decides the default window.
    """

    policy: Policy
    layer: int
    num_tokens: int
    budget: int
    always: tuple[Range, ...]
    caller_scores: bool = False

    @property
    def window(self) -> int:
        """w: the observation window, never more than the prompt."""
        return min(self.policy.observation_window(caller_scores=self.caller_scores), self.num_tokens)

    @property
    def always_count(self) -> int:
        """A: how many tokens are always kept."""
        return count(self.always)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing competes: n <= B."""
        return self.num_tokens <= self.budget

    @property
    def contended(self) -> int:
        """B_sel = B - A: the places that contenders compete for."""
        return 0 if self.keeps_all else self.budget - self.always_count

    @property
    def propagates(self) -> bool:
        """Whether the graph can change a score here; where not, the layer's answer is the base method's."""
        graph = self.policy.graph
        return graph is not None and graph.propagates and self.contended > 0

    @property
    def needs_keys(self) -> bool:
        """Whether the graph reads keys of contenders (or the similarity keys that stand in for them)."""
        return self.propagates

    @property
    def candidates(self) -> int | None:
        """C: how many of the best contenders take part, None = all. The base method needs only those it keeps."""
        if not self.propagates or self.policy.graph is None:
            return self.contended
        return self.policy.graph.candidate_count(self.budget, self.contended)

    @property
    def candidate_width(self) -> int:
        """Slots per KV head of a narrowed layer: min(C, n - A); rows with fewer contenders are padded."""
        contenders = self.num_tokens - self.always_count
        return contenders if self.candidates is None else min(self.candidates, contenders)


def plan_layers(
    policy: Policy,
    *,
    num_tokens: int,
    num_layers: int,
    pinned: Sequence[Range] = (),
    caller_scores: bool = False,
) -> tuple[LayerPlan, ...]:
    """One plan a layer for a prompt of `num_tokens`.

    Raises InvalidInputError where a pinned range lies outside the prompt or the pinned tokens exceed a layer's budget.
    """
    pinned = check_pinned(pinned, num_tokens)
    window = policy.observation_window(caller_scores=caller_scores)
    budget = policy.tokens(num_tokens)

    @functools.cache  # layers of one budget share theirs: there may be many layers, and many ranges
    def always(tokens: int) -> tuple[Range, ...]:
        return always_kept(num_tokens, tokens, pinned=pinned, sinks=policy.effective_sinks, window=window)

    usual = always(budget)
    size = count(usual)
    budgets = ALLOCATIONS[policy.budget_allocation](num_layers, num_tokens, budget, size)
    if policy.page_align is not None:
        budgets = [_aligned(tokens, num_tokens, policy.page_align) for tokens in budgets]
    uncut = size < budget < num_tokens  # no token was left out of them for want of room: nor is one where there is as much
    kept = [usual if uncut and size <= tokens < num_tokens else always(tokens) for tokens in budgets]
    return tuple(
        LayerPlan(policy, layer, num_tokens, tokens, kept[layer], caller_scores) for layer, tokens in enumerate(budgets)
    )


def uniform(layers: int, tokens: int, budget: int, always: int) -> list[int]:
    """B for every layer."""
    return [budget] * layers


def pyramid(layers: int, tokens: int, budget: int, always: int) -> list[int]:
    """PyramidKV (arXiv:2406.02069): more in the first layers, less in the last, about `budget` on average.

    The rule of the authors' code, with P = budget - always in the place of its capacity less the window.
    """
    contended = budget - always
    if contended < 1 or tokens < 2 * contended or tokens < budget or layers == 1:
        return [budget] * layers
    low = contended // 20
    high = 2 * contended - low
    if high >= tokens - always:
        high = tokens - always
        low = 2 * contended - high
    step = (high - low) // (layers - 1)
    return [always + high - layer * step for layer in range(layers)]


ALLOCATIONS: Mapping[str, Callable[[int, int, int, int], list[int]]] = {"uniform": uniform, "pyramid": pyramid}


def _aligned(budget: int, tokens: int, page: int) -> int:
    """The budget raised until a whole number of pages is dropped."""
    return tokens - page * ((tokens - budget) // page) if tokens > budget else budget
