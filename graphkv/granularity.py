"""Coarser answers: rows that share one set of kept tokens, tokens that share a page.

A Part is what some rows bring to a shared answer; parts of heads make a layer's, parts of layers a model's. Rows bring
their scores, combined by mean or max; after sequential propagation, whose scores belong to one row's selection, they vote.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from graphkv.budgets import LayerPlan
from graphkv.candidates import contended_tokens
from graphkv.graph import Propagation
from graphkv.heads import own_choice
from graphkv.kernels import Kernels, kernels_for
from graphkv.pages import page_values, sums, tokens_of
from graphkv.terms.always_kept import count

__all__ = ["Part", "Settled", "joined", "part_of", "settle"]


@dataclass(frozen=True, slots=True)
class Part:
    """What `rows` rows, one a KV head, bring to the answer they share. Vectors [n], on one device.

    value float64: the sum (or the largest) of their updated scores, or how many of them keep a token; -inf where it
    competes in none, or not in all. base: the same of the base method; None where nothing propagates. tie float64: what
    decides between equal votes, else None. mass float64: the sum of their shifted base scores. present int32: in how many
    of them a token competes (as a candidate, where they vote). total: the mass of all that competes.
    """

    plan: LayerPlan
    rows: int
    value: torch.Tensor
    base: torch.Tensor | None
    tie: torch.Tensor | None
    mass: torch.Tensor
    present: torch.Tensor
    total: float

    @property
    def nbytes(self) -> int:
        """Bytes of its vectors."""
        vectors = (self.value, self.base, self.tie, self.mass, self.present)
        return sum(vector.nbytes for vector in vectors if vector is not None)

    @staticmethod
    def bytes_for(num_tokens: int) -> int:
        """The most bytes that the vectors of a part of so many tokens take."""
        return num_tokens * (4 * 8 + 4)

    def combined(self, value: torch.Tensor) -> torch.Tensor:
        """float64 [n]: what the sum or the largest over the rows, or their votes, say of a token."""
        mean = self.tie is None and self.plan.policy.combine == "mean"
        return value / self.rows if mean else value


@dataclass(frozen=True, slots=True)
class Settled:
    """The answer of the rows of a part: kept bool [n]; pages bool [pages], None where it is tokens.

    kept_mass: the part's mass that is kept. changed: how many kept tokens the base method would not have kept, over the rows.
    """

    kept: torch.Tensor
    pages: torch.Tensor | None
    kept_mass: float
    changed: int


def part_of(layer: Propagation, heads: Sequence[int], kernels: Kernels | None = None) -> Part:
    """The part of some of a layer's rows, taken in order."""
    return joined(_row_part(layer, head, kernels) for head in heads)


def joined(parts: Iterable[Part]) -> Part:
    """The part of all their rows; in the order given, since sums of floating numbers have one. Holds one of them at a time."""
    others = iter(parts)
    first = next(others)
    rows, totals = first.rows, [first.total]
    largest = first.tie is None and first.plan.policy.combine == "max"
    value, base, tie = first.value.clone(), _copy(first.base), _copy(first.tie)
    mass, present = first.mass.clone(), first.present.clone()
    for part in others:
        _meet(value, part.value, largest=largest, votes=first.tie is not None)
        if base is not None and part.base is not None:
            _meet(base, part.base, largest=largest, votes=first.tie is not None)
        if tie is not None and part.tie is not None:
            tie += part.tie
        mass += part.mass
        present += part.present
        rows += part.rows
        totals.append(part.total)
    total = math.fsum(totals)
    return replace(first, rows=rows, value=value, base=base, tie=tie, mass=mass, present=present, total=total)


def settle(part: Part, kernels: Kernels | None = None) -> Settled:
    """The tokens or pages the rows keep together."""
    plan = part.plan
    if plan.keeps_all:
        kept = torch.ones(plan.num_tokens, dtype=torch.bool, device=part.value.device)
        pages = None if plan.policy.page_size is None else kept.new_ones(plan.page_count)
        return Settled(kept, pages, 0.0, 0)
    kept, pages = _kept(part, part.value, kernels)
    changed = 0
    if part.base is not None:
        without, _ = _kept(part, part.base, kernels)
        changed = int(part.present[kept & ~without].sum())
    return Settled(kept, pages, float(part.mass[kept].sum()), changed)


def _row_part(layer: Propagation, head: int, kernels: Kernels | None) -> Part:
    candidates, plan, row = layer.layer, layer.layer.plan, layer.rows[head]
    facts, shift = candidates.facts[head], candidates.shifts()[head]
    total = float(facts[0] - shift * facts[2])
    device = candidates.ids.device
    if plan.keeps_all:
        zeros = torch.zeros(plan.num_tokens, dtype=torch.float64, device=device)
        return Part(plan, 1, zeros, None, None, zeros, zeros.to(torch.int32), 0.0)
    ids = candidates.ids[head, : row.size].to(torch.int64)
    if plan.votes:
        absent = torch.full((plan.num_tokens,), -math.inf, dtype=torch.float64, device=device)
        tie = torch.zeros_like(absent).index_copy_(0, ids, row.scores)
        present = torch.zeros_like(absent, dtype=torch.int32).index_fill_(0, ids, 1)
        vote, base = own_choice(row, layer.updated[head], kernels), own_choice(row, None, kernels)
        value = absent.index_copy(0, ids, vote.to(torch.float64))
        return Part(plan, 1, value, absent.index_copy_(0, ids, base.to(torch.float64)), tie, tie, present, total)
    if candidates.all_scores is None:
        raise TypeError("scores that combine were asked of a layer that has only its candidates'")
    scores = candidates.all_scores[head].to(torch.float64)
    competes = scores > -math.inf
    mass = (scores - shift).masked_fill_(~competes, 0.0)
    if not plan.propagates:
        return Part(plan, 1, scores, None, None, mass, competes.to(torch.int32), total)
    value = (scores - shift).index_copy_(0, ids, layer.values(head))
    return Part(plan, 1, value, scores, None, mass, competes.to(torch.int32), total)


def _meet(value: torch.Tensor, other: torch.Tensor, *, largest: bool, votes: bool) -> None:
    """Two rows' values of the same tokens, in place of the first: votes of whoever has one, scores where both have one."""
    if votes:
        both = value.clamp(min=0.0).add_(other.clamp(min=0.0))
        value.copy_(both.masked_fill_((value == -math.inf) & (other == -math.inf), -math.inf))
    elif largest:
        neither = (value == -math.inf) | (other == -math.inf)
        torch.maximum(value, other, out=value).masked_fill_(neither, -math.inf)
    else:
        value += other


def _kept(part: Part, value: torch.Tensor, kernels: Kernels | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """bool [n] the tokens and bool [pages] the pages kept: those always kept, and the best by value, then tie, then place."""
    plan, size = part.plan, part.plan.policy.page_size
    value = part.combined(value)
    if size is None:
        return ~contended_tokens(plan, value.device) | _best(value, part.tie, plan.contended, kernels), None
    worth, tie = page_values(value, size, plan.policy.combine), None
    if part.tie is not None:
        held = page_values(value, size, "max") > -math.inf
        worth = sums(value.clamp(min=0.0), size).masked_fill_(~held, -math.inf)
        tie = sums(part.tie, size)
    pages = torch.zeros(worth.shape[0], dtype=torch.bool, device=value.device)
    for start, stop in plan.always_pages:
        pages[start:stop] = True
    pages |= _best(worth.masked_fill(pages, -math.inf), tie, plan.page_count - count(plan.always_pages), kernels)
    return tokens_of(pages, size, plan.num_tokens), pages


def _best(value: torch.Tensor, tie: torch.Tensor | None, most: int, kernels: Kernels | None) -> torch.Tensor:
    """bool [n]: the `most` best above -inf."""
    if tie is None:
        return (kernels or kernels_for(value.device)).top_tokens(value[None], most)[0]
    order = torch.sort(tie, descending=True, stable=True).indices
    order = order[torch.sort(value[order], descending=True, stable=True).indices][:most]
    return torch.zeros_like(value, dtype=torch.bool).index_fill_(0, order, True) & (value > -math.inf)


def _copy(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.clone()
