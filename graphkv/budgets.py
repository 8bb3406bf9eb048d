"""How many tokens each layer keeps, and which of them whatever their score: a call's plan, in pure integers.

`plan_layers` turns a policy and a prompt's length into one LayerPlan a layer; the client, the server and the algorithm
all work from it, so that they never disagree about a size. Knows no tensor.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from graphkv.terms.always_kept import Range, always_kept, always_kept_pages, check_pinned, count
from graphkv.terms.needs import check_outputs
from graphkv.terms.policy import Policy

__all__ = ["LayerPlan", "allocated_plans", "plan_layers"]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer of one prompt is to keep.

    budget: B of this layer. always: the always-kept tokens, disjoint ascending ranges (start, stop). caller_scores:
    whether the importance is the caller's own (`scores=`), which decides the default window. outputs: what the answer
    holds besides the tokens. always_pages: the pages kept whatever their score, likewise, where the answer is pages.
    allocated: False as long as the budget waits for all layers (see `allocated_plans`); pinned: as the caller gave them.
    """

    policy: Policy
    layer: int
    num_tokens: int
    budget: int
    always: tuple[Range, ...]
    caller_scores: bool = False
    outputs: tuple[str, ...] = ()
    always_pages: tuple[Range, ...] = ()
    allocated: bool = True
    pinned: tuple[Range, ...] = ()

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
    def votes(self) -> bool:
        """Whether the rows that share an answer vote: sequential scores belong to one row's selection."""
        graph = self.policy.graph
        return self.propagates and graph is not None and graph.update == "sequential" and self.policy.is_coarse

    @property
    def needs_all_scores(self) -> bool:
        """Whether the answer depends on the scores of all contenders, not of the candidates alone."""
        if self.keeps_all:
            return False
        shared = self.policy.is_coarse and not self.votes
        return shared or self.policy.budget_allocation == "adaptive_heads" or "updated_scores" in self.outputs

    @property
    def page_count(self) -> int:
        """How many pages are kept; 0 where the answer is tokens."""
        size = self.policy.page_size
        if size is None:
            return 0
        return -(-self.num_tokens // size) if self.keeps_all else max(1, self.budget // size)

    @property
    def needs_keys(self) -> bool:
        """Whether the graph reads keys of contenders (or the similarity keys that stand in for them)."""
        return self.propagates

    @property
    def candidates(self) -> int | None:
        """C: how many of the best contenders take part, None = all. The base method needs only those it keeps."""
        if not self.propagates or self.policy.graph is None:
            return None if self.needs_all_scores else self.contended
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
    outputs: Sequence[str] = (),
) -> tuple[LayerPlan, ...]:
    """One plan a layer for a prompt of `num_tokens`.

    Where the budget waits for all layers ("cake"), plans have the mean one and `allocated` False. Raises InvalidInputError
    where a pinned range lies outside the prompt, the pinned tokens or their pages exceed a layer's budget, or the policy
    cannot give an output.
    """
    pinned = check_pinned(pinned, num_tokens)
    outputs = check_outputs(policy, outputs)
    budget = policy.tokens(num_tokens)
    usual = always_kept(
        num_tokens,
        budget,
        pinned=pinned,
        sinks=policy.effective_sinks,
        window=policy.observation_window(caller_scores=caller_scores),
    )
    first = LayerPlan(policy, 0, num_tokens, budget, usual, caller_scores, outputs, pinned=pinned)
    budgets = ALLOCATIONS[policy.budget_allocation](num_layers, num_tokens, budget, count(usual))
    waits = policy.budget_allocation == "cake" and first.contended > 0
    return _planned(first, budgets, allocated=not waits)


def allocated_plans(plans: Sequence[LayerPlan], weights: Sequence[float]) -> tuple[LayerPlan, ...]:
    """The plans of all layers of a prompt with the budgets that "cake" gives them.

    weights: of each layer, finite and >= 0. L x (B - A) tokens in proportion: floors, then one more to the largest
    fractions, ties to the lower layer; what a layer has above n - A is shared again among the others in the same way.
    """
    first = plans[0]
    most = first.num_tokens - first.always_count
    left, shares = len(plans) * first.contended, [0] * len(plans)
    while left > 0:
        open_layers = [layer for layer, share in enumerate(shares) if share < most]
        for layer, more in zip(open_layers, _in_proportion(left, [weights[layer] for layer in open_layers]), strict=True):
            shares[layer] += more
        left = sum(max(0, share - most) for share in shares)
        shares = [min(share, most) for share in shares]
    return _planned(first, [first.always_count + share for share in shares], allocated=True)


def _in_proportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts, exactly in proportion to the weights but for rounding; evenly where all are zero."""
    ratios = [weight.as_integer_ratio() for weight in weights]
    scale = max(below for _, below in ratios)  # powers of two, so whole numbers take the place of fractions: there may be many
    exact = [above * (scale // below) for above, below in ratios]
    if not any(exact):
        exact = [1] * len(exact)
    whole = sum(exact)
    quotas = [divmod(total * weight, whole) for weight in exact]
    parts = [part for part, _ in quotas]
    by_fraction = sorted(range(len(parts)), key=lambda place: (-quotas[place][1], place))
    for place in by_fraction[: total - sum(parts)]:
        parts[place] += 1
    return parts


def _planned(first: LayerPlan, budgets: Sequence[int], *, allocated: bool) -> tuple[LayerPlan, ...]:
    """A plan a budget: `first` with it, and the always-kept tokens and pages that go with it."""
    policy, tokens = first.policy, first.num_tokens
    pinned, sinks = first.pinned, policy.effective_sinks
    window = policy.observation_window(caller_scores=first.caller_scores)

    @functools.cache  # layers of one budget share theirs: there may be many layers, and many ranges
    def always(budget: int) -> tuple[Range, ...]:
        return always_kept(tokens, budget, pinned=pinned, sinks=sinks, window=window)

    @functools.cache
    def pages(count: int) -> tuple[Range, ...]:
        return always_kept_pages(tokens, count, policy.page_size or 1, pinned=pinned, sinks=sinks, window=window)

    size = first.always_count
    uncut = size < first.budget < tokens  # no token was left out of them for want of room: nor is one where there is as much
    plans = []
    for layer, given in enumerate(budgets):
        aligned = allocated and policy.page_align is not None  # after the allocation, and once
        budget = _aligned(given, tokens, policy.page_align or 1) if aligned else given
        kept = first.always if uncut and size <= budget < tokens else always(budget)
        plan = replace(first, layer=layer, budget=budget, always=kept, allocated=allocated)
        if policy.page_size is not None:
            kept_pages = ((0, plan.page_count),) if plan.keeps_all else pages(plan.page_count)
            plan = replace(plan, always_pages=kept_pages)
        plans.append(plan)
    return tuple(plans)


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


ALLOCATIONS: Mapping[str, Callable[[int, int, int, int], list[int]]] = {
    "uniform": uniform,
    "pyramid": pyramid,
    "cake": uniform,  # until `allocated_plans` knows all layers
    "adaptive_heads": uniform,  # of the layer; its heads share it after the graph
}


def _aligned(budget: int, tokens: int, page: int) -> int:
    """The budget raised until a whole number of pages is dropped."""
    return tokens - page * ((tokens - budget) // page) if tokens > budget else budget
