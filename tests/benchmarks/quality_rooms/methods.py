"""Who chooses what is kept: every scorer of the catalogue that a prefill can feed, and on top of each the graph's settings.

All keep the first 4 and the last 32 tokens, so that nothing but the choice differs, and all of one base share its scores.
"""

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

import graphkv
from graphkv import Graph, Policy, Rope
from graphkv.algorithm import score_layer
from graphkv.budgets import plan_layers
from graphkv.layer import Layer
from graphkv.rope import unrotate
from graphkv.terms.catalogue import SCORERS
from graphkv.terms.errors import InvalidInputError
from quality_rooms.prefill import Prefilled

__all__ = ["BASES", "CONTROL", "GRAPHS", "Base", "Chooser", "Method", "methods"]

SINKS = 4
WINDOW = 32
CONTROL = "shuffled"


@dataclass(frozen=True, slots=True)
class Base:
    """A scorer with a budget allocation."""

    scorer: str
    allocation: str = "uniform"


BASES: Mapping[str, Base] = MappingProxyType(
    {name: Base(name) for name in SCORERS if name != "given"} | {"pyramidkv": Base("snapkv", "pyramid")}
)
GRAPHS: Mapping[str, Graph | None] = MappingProxyType(
    {
        "paper": Policy.paper(1).graph,
        "default": Policy(1).graph,
        "sequential 0.1": Policy.sequential(1).graph,
        "sequential 0.25": Policy.sequential(1, strength=0.25).graph,
        CONTROL: Policy.sequential(1).graph,  # the same graph as sequential 0.1, its vertices shuffled
    }
)


@dataclass(frozen=True, slots=True)
class Method:
    """base None: one that needs no scores. graph None: the base alone; otherwise a name in GRAPHS."""

    name: str
    base: str | None = None
    graph: str | None = None


def methods(bases: Mapping[str, Base] | list[str]) -> list[Method]:
    """Random, last, and each base with every graph; the full cache is judged apart, once a prompt."""
    found = [Method("random"), Method("last tokens")]
    for base in bases:
        found.append(Method(base, base))
        found += [Method(f"{base} + {graph}", base, graph) for graph in GRAPHS]
    return found


class Chooser:
    """The choices of all methods for one prompt, on `device`; what several of them need is computed once."""

    def __init__(self, prefilled: Prefilled, rope: Rope, *, device: str, seed: str) -> None:
        self.num_tokens = prefilled.num_tokens
        self._keys = [keys.to(device) for keys in prefilled.keys]
        self._queries = prefilled.queries
        self._rope = rope
        self._device = device
        self._seed = seed
        self._scores: dict[str, list[torch.Tensor]] = {}

    def choose(self, method: Method, budget: int) -> list[torch.Tensor]:
        """int64 [Hkv, B] a layer, on the CPU."""
        if method.base is None:
            return self._unscored(method.name, budget)
        base = BASES[method.base]
        graph = GRAPHS[method.graph] if method.graph else None
        policy = self._policy(base, budget, graph)
        scores = self.scores(base.scorer)
        arguments = {"similarity_keys": self._shuffled(policy, scores)} if method.graph == CONTROL else {"rope": self._rope}
        return _tokens(graphkv.select(self._keys, scores=scores, policy=policy, **arguments))

    def scores(self, scorer: str) -> list[torch.Tensor]:
        """float32 [Hkv, n] a layer, as the scorer gives them. Raises InvalidInputError for one that needs what no prefill has."""
        if scorer not in self._scores:
            policy = self._policy(Base(scorer), SINKS + WINDOW + 1, None)
            try:
                self._scores[scorer] = self._scored(policy, min(WINDOW, self.num_tokens))
            except InvalidInputError:
                self._scores[scorer] = self._scored(policy, self.num_tokens)  # it may want every query
        return self._scores[scorer]

    def _scored(self, policy: Policy, width: int) -> list[torch.Tensor]:
        plans = plan_layers(policy, num_tokens=self.num_tokens, num_layers=len(self._keys))
        reads = SCORERS[policy.scorer].reads_attention
        queries = [seen[:, -width:].to(self._device) if reads else None for seen in self._queries]
        layers = zip(plans, self._keys, queries, strict=True)
        return [score_layer(Layer(plan, keys, queries=seen)) for plan, keys, seen in layers]

    def _policy(self, base: Base, budget: int, graph: Graph | None) -> Policy:
        return Policy(budget, scorer=base.scorer, budget_allocation=base.allocation, window=WINDOW, sinks=SINKS, graph=graph)

    def _unscored(self, name: str, budget: int) -> list[torch.Tensor]:
        chance = torch.Generator().manual_seed(hash_of(f"{self._seed} {budget}"))
        heads = self._keys[0].shape[0]
        if name == "random":
            scores = [torch.rand(heads, self.num_tokens, generator=chance) for _ in self._keys]
        else:
            scores = [torch.arange(self.num_tokens, dtype=torch.float32).expand(heads, -1) for _ in self._keys]
        policy = Policy(budget, scorer="given", window=WINDOW, sinks=SINKS, graph=None)
        return _tokens(graphkv.select([keys.cpu() for keys in self._keys], scores=scores, policy=policy))

    @functools.cached_property
    def _unrotated(self) -> list[torch.Tensor]:
        positions = torch.arange(self.num_tokens, device=self._device)
        return [torch.stack([unrotate(head, positions, self._rope).float() for head in keys]) for keys in self._keys]

    def _shuffled(self, policy: Policy, scores: list[torch.Tensor]) -> list[torch.Tensor]:
        """The keys that the graph compares, each candidate with those of another one: same edges, on random tokens."""
        chance = torch.Generator().manual_seed(hash_of(f"{self._seed} {policy.budget} {policy.budget_allocation}"))
        plans = plan_layers(policy, num_tokens=self.num_tokens, num_layers=len(scores), caller_scores=True)
        shuffled = []
        for plan, keys, given in zip(plans, self._unrotated, scores, strict=True):
            competing = given[:, SINKS : self.num_tokens - WINDOW]
            best = SINKS + competing.topk(min(plan.candidate_width, competing.shape[1]), dim=1).indices
            mixed = keys.clone()
            for row, own, candidates in zip(mixed, keys, best, strict=True):
                order = torch.randperm(len(candidates), generator=chance).to(candidates.device)
                row[candidates] = own[candidates[order]]
            shuffled.append(mixed)
        return shuffled


def hash_of(text: str) -> int:
    """A seed for torch that does not change between processes."""
    return zlib.crc32(text.encode())


def _tokens(selection: graphkv.Selection) -> list[torch.Tensor]:
    return [indices.cpu().to(torch.int64) for indices in selection.indices]
