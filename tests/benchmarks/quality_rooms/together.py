"""Many choices for one prompt, all rows (the KV heads of all layers) at a time: what a GPU needs to be worth its launches.

The formulas of docs/algorithm.md on the scores of `graphkv`'s own scorers and the sizes of its own plans; a test holds it to
`graphkv.select`, token for token. Only what the benchmark asks for: decaying products, and sequential of strength below 1.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphkv import Graph, Policy
from graphkv.budgets import plan_layers
from graphkv.kernels.decay.chunked import SAME

__all__ = ["Sizes", "Task", "choose", "ranks", "sizes", "unit"]

LEAST = -1e30  # in the place of ln 0: the last, by index


@dataclass(frozen=True, slots=True)
class Sizes:
    """A policy's numbers, one a layer: B_sel, C, K and m (None: no limit). always: the always-kept tokens, of every layer."""

    graph: Graph | None
    always: tuple[tuple[int, int], ...]
    select: tuple[int, ...]
    width: tuple[int, ...]
    sources: tuple[int, ...]
    most: tuple[int, ...] | None


def sizes(policy: Policy, *, num_tokens: int, num_layers: int) -> Sizes:
    """Those of a prompt's plans. Raises ValueError where layers differ in what they always keep."""
    plans = plan_layers(policy, num_tokens=num_tokens, num_layers=num_layers, caller_scores=True)
    graph = policy.graph
    if len({plan.always for plan in plans}) > 1:
        raise ValueError(f"not known here: a budget of {policy.budget}, too small for what is always kept")
    sources = tuple(graph.source_count(plan.budget, plan.contended) if graph else 0 for plan in plans)
    most = [graph.neighbor_count(plan.budget, own) if graph else None for plan, own in zip(plans, sources, strict=True)]
    return Sizes(
        graph,
        plans[0].always,
        tuple(plan.contended for plan in plans),
        tuple(plan.candidate_width for plan in plans),
        sources,
        None if None in most else tuple(number or 0 for number in most),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One method's sizes, scores float32 [L, Hkv, n] and unit keys, of those that the graph compares, float32 [R, n, d].

    Tasks that share a tensor share what follows from it.
    """

    sizes: Sizes
    scores: torch.Tensor
    unit: torch.Tensor | None = None


def unit(keys: torch.Tensor) -> torch.Tensor:
    """float32 [R, n, d]: keys [L, Hkv, n, d] over their norms."""
    wide = keys.double().flatten(0, 1)
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / torch.where(norms > 0, norms, 1.0)).float()


def ranks(values: torch.Tensor) -> torch.Tensor:
    """int64: the place of each in its row's order, the largest first, ties to the lower index."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(-1, order, _range(values.shape[-1], values.device).expand_as(order))


@functools.lru_cache(maxsize=64)
def _range(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device)


@functools.lru_cache(maxsize=256)
def _rows(of_layers: tuple[int, ...], heads: int, device: torch.device) -> torch.Tensor:
    """int64 [R]: a layer's number for each of its heads."""
    return torch.tensor(of_layers).repeat_interleave(heads).to(device)


class _Candidates:
    """R = L x Hkv rows: the candidates in ascending order, their shifted scores float64 [R, C], and their cosines."""

    def __init__(self, task: Task) -> None:
        own = task.sizes
        layers, heads, tokens = task.scores.shape
        self._device = task.scores.device
        self._heads = heads
        self._unit = task.unit
        self.always = torch.zeros(layers * heads, tokens, dtype=torch.bool, device=self._device)
        for start, stop in own.always:
            self.always[:, start:stop] = True
        scores = task.scores.flatten(0, 1)
        least = scores.masked_fill(self.always, math.inf).amin(dim=1, keepdim=True)
        scores = scores.masked_fill(self.always, -math.inf)
        taken = ranks(scores) < self.rows(own.width)[:, None]
        places = _range(tokens, self._device).expand_as(scores)
        ids = places.masked_fill(~taken, tokens).sort(dim=1).values[:, : max(own.width)]
        self.real = ids < tokens
        self.ids = ids.clamp(max=tokens - 1)
        self.scores = (scores.double() - least.clamp(max=0.0)).gather(1, self.ids).masked_fill_(~self.real, -math.inf)
        self.ranks = ranks(self.scores)
        self._edges: dict[tuple[int, ...], torch.Tensor] = {}
        self._edge_ranks: dict[tuple[int, ...], torch.Tensor] = {}

    def rows(self, of_layers: tuple[int, ...]) -> torch.Tensor:
        """int64 [R]."""
        return _rows(of_layers, self._heads, self._device)

    @functools.cached_property
    def own_unit(self) -> torch.Tensor:
        """float32 [R, C, d]; zero where there is no candidate."""
        if self._unit is None:
            raise TypeError("a graph without keys")
        places = self.ids[..., None].expand(-1, -1, self._unit.shape[2])
        return self._unit.gather(1, places).masked_fill_(~self.real[..., None], 0.0)

    def cosines(self, of: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [R, C or K, C], clamped and snapped; `of` int64 [R, K]: of those candidates alone."""
        left = self.own_unit if of is None else self.own_unit.gather(1, of[..., None].expand(-1, -1, self.own_unit.shape[2]))
        edges = (left.double() @ self.own_unit.double().transpose(1, 2)).float().clamp_(0.0, 1.0)
        return edges.masked_fill_(edges >= SAME, 1.0)

    def edges(self, sources: tuple[int, ...]) -> torch.Tensor:
        """float32 [R, K, C]: those of the sources, best first, to the candidates that are none."""
        if sources not in self._edges:
            most, numbers = max(sources), self.rows(sources)[:, None]
            order = self.scores.sort(dim=1, descending=True, stable=True).indices[:, :most]
            edges = self.cosines(order).masked_fill_((self.ranks < numbers)[:, None], 0.0)
            surplus = _range(most, edges.device) >= numbers
            self._edges[sources] = edges.masked_fill_(surplus[..., None], 0.0)
        return self._edges[sources]

    def edge_ranks(self, sources: tuple[int, ...]) -> torch.Tensor:
        """int64 [R, K, C]: which neighbor of its source each candidate is, the nearest 0."""
        if sources not in self._edge_ranks:
            self._edge_ranks[sources] = ranks(self.edges(sources))
        return self._edge_ranks[sources]

    def best(self, updated: torch.Tensor, select: tuple[int, ...]) -> torch.Tensor:
        """bool [R, C]: the B_sel best of each row."""
        return (ranks(updated) < self.rows(select)[:, None]) & self.real

    def kept(self, chosen: torch.Tensor) -> torch.Tensor:
        """bool [R, n]: the chosen ones of the candidates, and those that are always kept."""
        return self.always.scatter(1, self.ids, chosen | ~self.real & self.always.gather(1, self.ids))


def choose(tasks: Sequence[Task]) -> list[list[torch.Tensor]]:
    """A task's answer: int64 [Hkv, B] a layer, ascending, on the CPU."""
    known: dict[tuple[object, ...], _Candidates] = {}
    kept: list[torch.Tensor | None] = [None] * len(tasks)
    sequential: list[tuple[int, _Candidates]] = []
    for place, task in enumerate(tasks):
        own = task.sizes
        key = id(task.scores), id(task.unit), own.always, own.width
        candidates = known.get(key) or known.setdefault(key, _Candidates(task))
        if own.graph is not None and own.graph.update == "sequential":
            sequential.append((place, candidates))
            continue
        updated = candidates.scores if own.graph is None else _decayed(candidates, own, own.graph)
        kept[place] = candidates.kept(candidates.best(updated, own.select))
    if sequential:
        chosen = _sequential([(tasks[place].sizes, candidates) for place, candidates in sequential])
        for (place, candidates), mask in zip(sequential, chosen, strict=True):
            kept[place] = candidates.kept(mask)
    whole = torch.stack([mask for mask in kept if mask is not None]).cpu()
    return [_by_layer(mask, task.scores.shape[1]) for mask, task in zip(whole, tasks, strict=True)]


def _by_layer(mask: torch.Tensor, heads: int) -> list[torch.Tensor]:
    return [own.nonzero()[:, 1].view(heads, -1) for own in mask.view(-1, heads, mask.shape[1])]


def _decayed(candidates: _Candidates, own: Sizes, graph: Graph) -> torch.Tensor:
    """float64 [R, C]: one-shot propagation."""
    if graph.update != "product" or graph.signal != "decay":
        raise ValueError(f"not known here: {graph}")
    edges = candidates.edges(own.sources)
    near = edges >= graph.threshold
    if own.most is not None:
        near &= candidates.edge_ranks(own.sources) < candidates.rows(own.most)[:, None, None]
    factor = (edges * near).double().mul_(-graph.strength).add_(1.0).prod(dim=1).pow(graph.rounds)
    return candidates.scores.masked_fill(~candidates.real, 0.0).mul_(factor).masked_fill_(~candidates.real, -math.inf)


def _sequential(work: Sequence[tuple[Sizes, _Candidates]]) -> list[torch.Tensor]:
    """bool [R, C] each: the choices of all of them, a step at a time."""
    different = list(dict.fromkeys(candidates for _, candidates in work))
    width = max(candidates.ids.shape[1] for candidates in different)
    number = different[0].ids.shape[0]
    device = different[0].ids.device
    cosines = torch.zeros(len(different), number, width, width, device=device)
    for place, candidates in zip(cosines, different, strict=True):
        own = candidates.ids.shape[1]
        place[:, :own, :own] = candidates.cosines()
    cosines = cosines.flatten(0, 1)
    level = torch.full((len(work), number, width), -math.inf, dtype=torch.float64, device=device)
    for place, (_, candidates) in zip(level, work, strict=True):
        logs = candidates.scores.log().clamp_(min=LEAST).masked_fill_(~candidates.real, -math.inf)
        place[:, : candidates.ids.shape[1]] = logs
    level = level.flatten(0, 1)
    strengths = [own.graph.strength for own, _ in work if own.graph is not None]
    if max(strengths) >= 1.0:
        raise ValueError("not known here: sequential of strength 1")
    lowered = -torch.tensor(strengths, dtype=torch.float64).repeat_interleave(number).to(device)[:, None]
    first = torch.tensor([different.index(candidates) * number for _, candidates in work])
    of = (first[:, None] + torch.arange(number)).flatten().to(device)
    select = torch.cat([candidates.rows(own.select) for own, candidates in work])
    steps = max(max(own.select) for own, _ in work)
    order = torch.empty(level.shape[0], steps, dtype=torch.int64, device=device)
    for step in range(steps):
        kept = level.argmax(dim=1, keepdim=True)
        order[:, step : step + 1] = kept
        level += torch.mul(cosines[of, kept[:, 0]], lowered).log1p_()
        level.scatter_(1, kept, -math.inf)
    taken = _range(steps, device) < select[:, None]
    spare = torch.where(taken, order, width)
    chosen = torch.zeros(level.shape[0], width + 1, dtype=torch.bool, device=device).scatter_(1, spare, True)
    masks = chosen[:, :width].view(len(work), number, width)
    return [mask[:, : candidates.ids.shape[1]] & candidates.real for mask, (_, candidates) in zip(masks, work, strict=True)]
