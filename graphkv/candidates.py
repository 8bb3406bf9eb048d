"""Candidates: the best contenders of each KV head, all that the graph and the selection need of a layer.

What a caller with torch sends: it does not grow with the prompt, and the answer is the same as when everything is sent.
"""

from dataclasses import dataclass, field

import torch

from graphkv.arrays import floating
from graphkv.budgets import LayerPlan
from graphkv.terms.errors import InvalidInputError, Reason, invalid
from graphkv.terms.needs import check_graph_inputs
from graphkv.terms.rope import Rope

__all__ = ["Candidates", "contended_tokens"]


def contended_tokens(plan: LayerPlan, device: torch.device) -> torch.Tensor:
    """bool [n]: True for the tokens that compete, False for those always kept."""
    competes = torch.ones(plan.num_tokens, dtype=torch.bool, device=device)
    for start, stop in plan.always:
        competes[start:stop] = False
    return competes


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates of one layer, on one device; W = `plan.candidate_width` slots per KV head.

    ids int32 [Hkv, W]: token ids, ascending, the valid ones first, then -1.
    scores float32 [Hkv, W]: base scores as the scorer gave them; -inf in padding slots.
    facts float64 [Hkv, 3]: sum, smallest and number of *all* contenders' scores (0, 0, 0 where there are none).
    all_scores float32 [Hkv, n]: base scores of all contenders, -inf of all other tokens; where the plan needs them.
    keys [Hkv, W, d] of the candidates, in their own dtype, anything finite in padding slots; None where the graph needs
    none. similarity_keys [Hkv, W, x] stand in for the keys in the graph. positions [Hkv, W], integers, where the
    caller gave positions. indexed: keys, similarity_keys and positions cover all n tokens instead, and `ids` point
    into them (in-process, where nothing needs to be gathered).
    """

    plan: LayerPlan
    ids: torch.Tensor
    scores: torch.Tensor
    facts: torch.Tensor
    keys: torch.Tensor | None = None
    similarity_keys: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    rope: Rope | None = None
    indexed: bool = field(default=False)
    all_scores: torch.Tensor | None = None

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.ids.shape[0]

    def counts(self) -> list[int]:
        """How many slots are valid, per KV head: all contenders, or as many as there is room for."""
        width = self.plan.candidate_width
        return [min(width, int(number)) for number in self.facts[:, 2].tolist()]

    def shifts(self) -> torch.Tensor:
        """float64 [Hkv], what step 1 subtracts: the smallest contender's score where that is negative; decay must lower."""
        return self.facts[:, 1].clamp(max=0.0)

    def check(self) -> None:
        """Raises InvalidInputError where what came from outside cannot be the candidates of this plan.

        What it accepts may still be a lie about scores, which harms the answer of the liar alone: every id is in range,
        given once, and not always kept, so the answer has the form that was promised.
        """
        heads, width = self.kv_heads, self.plan.candidate_width
        _dims("candidate_ids", self.ids, (heads, width))
        _dims("scores", self.scores, (heads, width))
        _dims("row_facts", self.facts, (heads, 3))
        if self.plan.needs_all_scores and self.all_scores is None:
            raise invalid(
                "scores", f"of {width} candidates", "of all tokens: the answer depends on them", reason=Reason.BAD_SHAPE
            )
        if self.plan.needs_keys:
            check_graph_inputs(
                self.plan.policy,
                similarity_keys=self.similarity_keys is not None,
                rope=self.rope,
                head_dim=0 if self.keys is None else self.keys.shape[-1],
            )
            role = "keys" if self.similarity_keys is None else "similarity_keys"
            given = getattr(self, role)
            if given is None:
                raise invalid(role, None, "given: the graph compares them", reason=Reason.BAD_SHAPE)
            if given.ndim != 3 or tuple(given.shape[:2]) != (heads, width):
                raise invalid(role, list(given.shape), f"[{heads}, {width}, d]", reason=Reason.BAD_SHAPE)
            floating(role, given)
        if self.positions is not None:
            _dims("positions", self.positions, (heads, width))
        self._check_facts()
        self._check_ids()

    def _check_facts(self) -> None:
        most = self.plan.num_tokens - self.plan.always_count
        for head, (total, smallest, number) in enumerate(self.facts.tolist()):
            if not (0 <= number <= most and number == int(number)):  # NaN compares false
                raise invalid("row_facts", number, f"a number of contenders from 0 to {most}", reason=Reason.BAD_SHAPE)
            if not (abs(total) < float("inf") and abs(smallest) < float("inf")):
                message = f"row_facts hold {total}, {smallest} at layer {self.plan.layer}, KV head {head}; they must be finite"
                raise InvalidInputError(message, argument="row_facts", reason=Reason.NON_FINITE)

    def _check_ids(self) -> None:
        counts = torch.tensor(self.counts(), device=self.ids.device)[:, None]
        slots = torch.arange(self.ids.shape[1], device=self.ids.device)
        valid = slots < counts
        ids = self.ids.to(torch.int64)
        expected = f"ascending contenders among {self.plan.num_tokens} tokens, then -1"
        ascending = (ids[:, 1:] > ids[:, :-1]) | ~valid[:, 1:]
        inside = (ids >= 0) & (ids < self.plan.num_tokens)
        if not bool(torch.where(valid, inside, ids == -1).all()) or not bool(ascending.all()):
            raise invalid(
                "candidate_ids", f"out of order or range at layer {self.plan.layer}", expected, reason=Reason.BAD_SHAPE
            )
        competes = contended_tokens(self.plan, self.ids.device)
        if not bool((competes[ids.clamp(min=0)] | ~valid).all()):
            raise invalid("candidate_ids", "an always-kept token", expected, reason=Reason.BAD_SHAPE)
        scores = torch.where(valid, self.scores, 0.0)
        if not bool(torch.isfinite(scores).all()):
            head, slot = (~torch.isfinite(scores)).nonzero()[0].tolist()
            where = f"layer {self.plan.layer}, KV head {head}, token {int(ids[head, slot])}"
            message = f"scores hold {float(scores[head, slot])} at {where}; they must be finite"
            raise InvalidInputError(message, argument="scores", reason=Reason.NON_FINITE)


def _dims(role: str, tensor: torch.Tensor, dims: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != dims:
        raise invalid(role, list(tensor.shape), str(list(dims)), reason=Reason.BAD_SHAPE)
