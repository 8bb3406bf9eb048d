"""A stand-in for a client: the same stream, answered by `graphkv.select` in this process."""

from collections.abc import Iterator
from typing import Any

import torch

import graphkv


class InProcess:
    """Has the one method that the transformers adapter asks of a client."""

    def stream(self, *, num_layers: int, policy: graphkv.Policy, rope: graphkv.Rope | None = None) -> "InProcessStream":
        return InProcessStream(num_layers, policy, rope)


class InProcessStream:
    """Holds what was put, and chooses when it is read."""

    def __init__(self, num_layers: int, policy: graphkv.Policy, rope: graphkv.Rope | None) -> None:
        self._layers: list[dict[str, torch.Tensor]] = [{} for _ in range(num_layers)]
        self._policy = policy
        self._rope = rope
        self.summary = graphkv.Summary()

    def __enter__(self) -> "InProcessStream":
        return self

    def __exit__(self, *raised: object) -> None:
        self._layers = []

    def put(self, layer: int, **tensors: torch.Tensor) -> None:
        self._layers[layer] = tensors

    def __iter__(self) -> Iterator[graphkv.LayerSelection]:
        inputs: dict[str, Any] = {role: [layer[role] for layer in self._layers] for role in self._layers[0]}
        yield from graphkv.select(**inputs, policy=self._policy, rope=self._rope)
