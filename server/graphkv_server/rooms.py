"""How much room a layer takes: while tokens are chosen, while its part waits for other layers, until its answer is sent.

What is promised at the header and what is kept later are counted here alike. Knows plans and counts, no tensor.
"""

from collections.abc import Sequence

from graphkv.algorithm import Part
from graphkv.budgets import LayerPlan

__all__ = ["answer_bytes", "part_bytes", "working_bytes"]

_COPIES = 2
"""An answer is held twice while it is written: as arrays and as a message."""


def working_bytes(plans: Sequence[LayerPlan], kv_heads: int) -> int:
    """What choosing in any of a prompt's layers, and answering, takes beside its tensors' own bytes, whichever is more."""
    most = 0
    for plan in {plan.budget: plan for plan in plans}.values():
        answer = answer_bytes(plan, kv_heads)
        if plan.policy.granularity == "model":
            answer = part_bytes(plan, Part.bytes_for(plan.num_tokens), layers=len(plans))
        most = max(most, answer)
    return max(most, kv_heads * plans[0].num_tokens)


def part_bytes(plan: LayerPlan, size: int, *, layers: int) -> int:
    """What stays of a layer whose part of `size` bytes waits for the others: that, and its share of the answer's room."""
    return size + -(-answer_bytes(plan, 1) // layers)


def answer_bytes(plan: LayerPlan, kv_heads: int) -> int:
    """The most that a layer's answer takes: its indices and the outputs asked for, at most of all its tokens."""
    tokens = plan.num_tokens
    rows = kv_heads if plan.policy.granularity == "head" else 1
    kept = tokens  # where the budget is not known yet
    if plan.allocated:
        kept = min(tokens, plan.page_count * (plan.policy.page_size or 1) or plan.budget)
    sizes = {
        "updated_scores": 4 * tokens,
        "keep_mask": tokens,
        "decay_factors": 4 * tokens,
        "choice_order": 4 * kept,
        "dropped_ranges": 3 * 4 * min(kept + 1, tokens),
        "moves": 3 * 4 * kept,
    }
    return _COPIES * rows * (4 * kept + sum(sizes[name] for name in plan.outputs))
