"""The choices of all methods for one prompt. All of one base share its scores, computed once a prompt.

On the CPU `graphkv.select` makes them; on a GPU, where it would wait for every launch, `together` does, token for token.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import torch

import graphkv
from graphkv import Policy, Rope
from graphkv.algorithm import score_layer
from graphkv.budgets import plan_layers
from graphkv.layer import Layer
from graphkv.rope import average_rope, unrotate
from graphkv.terms.catalogue import SCORERS
from quality_rooms import together
from quality_rooms.methods import BASES, CONTROL, SINKS, WINDOW, Base, Method, graph_of, policy_of
from quality_rooms.prefill import Prefilled

__all__ = ["Chooser"]

TO_COME = 512  # positions that expected_attention averages over, as its authors' code does


class Chooser:
    """Of one prompt, on `device`."""

    def __init__(self, prefilled: Prefilled, rope: Rope, *, device: str, seed: str) -> None:
        self._keys = torch.stack(prefilled.keys).to(device)
        self._prefilled = prefilled
        self._rope = rope
        self._device = device
        self._seed = seed
        self._scores: dict[str, torch.Tensor] = {}

    def choose(self, methods: Sequence[Method], budget: int) -> dict[str, list[torch.Tensor]]:
        """By method's name, int64 [Hkv, B] a layer, on the CPU."""
        if torch.device(self._device).type == "cpu":
            return {method.name: self.selected(method, budget) for method in methods}
        return self.chosen_together(methods, budget)

    def selected(self, method: Method, budget: int) -> list[torch.Tensor]:
        """One method's, by `graphkv.select`."""
        policy = policy_for(method, budget)
        named: dict[str, Any] = {}
        if method.graph == CONTROL:
            named["similarity_keys"] = list(self._shuffled(method, budget))
        elif policy.needs_rope:
            named["rope"] = self._rope
        found = graphkv.select(list(self._keys), scores=list(self._scores_of(method, budget)), policy=policy, **named)
        return [indices.cpu().to(torch.int64) for indices in found.indices]

    def chosen_together(self, methods: Sequence[Method], budget: int) -> dict[str, list[torch.Tensor]]:
        """All rows of all layers at a time."""
        tasks = []
        for method in methods:
            own = self._sizes(method, budget)
            compared = None
            if method.graph == CONTROL:
                compared = together.unit(self._shuffled(method, budget))
            elif own.graph is not None:
                compared = self._unit_plain if own.graph.similarity == "pre_rope" else self._unit
            tasks.append(together.Task(own, self._scores_of(method, budget), compared))
        return dict(zip((method.name for method in methods), together.choose(tasks), strict=True))

    def scores(self, scorer: str) -> torch.Tensor:
        """float32 [L, Hkv, n], as the scorer gives them."""
        if scorer not in self._scores:
            policy = policy_of(Base(scorer), SINKS + WINDOW + 1, None)
            plans = plan_layers(policy, num_tokens=self._keys.shape[2], num_layers=len(self._keys))
            layers = zip(plans, self._keys, strict=True)
            made = [score_layer(Layer(plan, keys, **self._read(scorer, layer))) for layer, (plan, keys) in enumerate(layers)]
            self._scores[scorer] = torch.stack(made)
        return self._scores[scorer]

    def _read(self, scorer: str, layer: int) -> dict[str, torch.Tensor]:
        """What a scorer reads of a layer beside its keys."""
        queries = self._prefilled.queries[layer].to(self._device)
        if SCORERS[scorer].needs:
            positions = torch.arange(SINKS, self._keys.shape[2], device=self._device)
            plain = unrotate(queries[:, SINKS:], positions, self._rope)
            mean = plain.mean(dim=1)
            spread = plain - mean[:, None]
            covariance = spread.transpose(1, 2) @ spread / plain.shape[1]
            mean, covariance = average_rope(mean, covariance, self._rope, start=self._keys.shape[2], count=TO_COME)
            norms = torch.linalg.vector_norm(self._prefilled.values[layer].to(self._device).float(), dim=-1)
            return {"query_mean": mean, "query_covariance": covariance, "value_norms": norms}
        rows = {"": 0, "window": WINDOW, "any": WINDOW, "all": self._keys.shape[2]}[SCORERS[scorer].query_rows]
        return {"queries": queries[:, -rows:]} if rows else {}

    def _scores_of(self, method: Method, budget: int) -> torch.Tensor:
        """float32 [L, Hkv, n]."""
        if method.base is not None:
            return self.scores(BASES[method.base].scorer)
        shape = self._keys.shape[:3]
        if method.name == "random":
            chance = torch.Generator().manual_seed(hash_of(f"{self._seed} {budget}"))
            return torch.rand(shape, generator=chance).to(self._device)
        return torch.arange(shape[2], dtype=torch.float32, device=self._device).expand(shape)

    def _sizes(self, method: Method, budget: int) -> together.Sizes:
        return _sizes(method, budget, self._keys.shape[2], self._keys.shape[0])

    @functools.cached_property
    def _unrotated(self) -> torch.Tensor:
        """float32 [L, Hkv, n, d]."""
        positions = torch.arange(self._keys.shape[2], device=self._device)
        return unrotate(self._keys.flatten(0, 1), positions, self._rope).float().view_as(self._keys)

    @functools.cached_property
    def _unit(self) -> torch.Tensor:
        return together.unit(self._keys)

    @functools.cached_property
    def _unit_plain(self) -> torch.Tensor:
        return together.unit(self._unrotated)

    def _shuffled(self, method: Method, budget: int) -> torch.Tensor:
        """The keys that the graph compares, each candidate with those of another one: same edges, on random tokens."""
        chance = torch.Generator().manual_seed(hash_of(f"{self._seed} {method.base} {budget}"))
        scores = self._scores_of(method, budget)
        own = self._sizes(method, budget)
        competing = scores.clone()
        for start, stop in own.always:
            competing[..., start:stop] = -torch.inf
        widths = torch.tensor(own.width, device=scores.device)[:, None, None]
        other = together.ranks(competing) >= widths
        places = torch.arange(scores.shape[2], device=scores.device, dtype=torch.float32).expand_as(scores)
        noise = torch.rand(scores.shape, generator=chance).to(scores.device)
        # the candidates first, once in their order and once in a random one; then all others in theirs
        to, by = ((mark.masked_fill(other, 0) + other * (places + 10**6)).sort(dim=2).indices for mark in (places, noise))
        to, by = (order[..., None].expand_as(self._unrotated) for order in (to, by))
        return self._unrotated.scatter(2, to, self._unrotated.gather(2, by))


def policy_for(method: Method, budget: int) -> Policy:
    """A method's policy; that of one without a base is for scores that are given."""
    base = Base("given") if method.base is None else BASES[method.base]
    return policy_of(base, budget, graph_of(method.graph))


@functools.lru_cache(maxsize=4096)
def _sizes(method: Method, budget: int, num_tokens: int, num_layers: int) -> together.Sizes:
    return together.sizes(policy_for(method, budget), num_tokens=num_tokens, num_layers=num_layers)


def hash_of(text: str) -> int:
    """A seed for torch that does not change between processes."""
    return zlib.crc32(text.encode())
