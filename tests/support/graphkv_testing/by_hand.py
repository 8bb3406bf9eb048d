"""Prompts small enough to work out by hand: keys by their cosines, scores as lists, answers as lists."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from graphkv import Graph, Policy, Selection, select

__all__ = ["PAPER", "SEQUENTIAL", "axis", "chosen", "listed", "towards"]

PAPER = {"neighbors": "auto", "threshold": 0.0, "candidates": None}
SEQUENTIAL = {"update": "sequential", "candidates": None, "strength": 1.0}


def axis(place: int) -> list[float]:
    """A unit key whose cosine to every other axis is 0."""
    return [1.0 if place == here else 0.0 for here in range(8)]


def towards(place: int, cosine: float, *, aside: int) -> list[float]:
    """A unit key whose cosine to that axis is `cosine`; the rest of it lies along another."""
    key = [0.0] * 8
    key[place], key[aside] = cosine, math.sqrt(1 - cosine * cosine)
    return key


def chosen(
    scores: Sequence[Any],
    budget: int,
    /,
    *,
    keys: Sequence[Any] | None = None,
    graph: dict[str, Any] | None = None,
    outputs: Sequence[str] = (),
    pinned: Sequence[tuple[int, int]] = (),
    **fields: Any,
) -> Selection:
    """One prompt whose scores are [Hkv][n], or [L][Hkv][n]; keys [n][d], the same in all heads, or [Hkv][n][d].

    Without keys no two tokens are alike. graph: fields of Graph, None for the base method.
    """
    given = torch.tensor(scores, dtype=torch.float32)
    given = given if given.ndim == 3 else given[None]
    layers, heads, tokens = given.shape
    similar = torch.eye(tokens) if keys is None else torch.tensor(keys, dtype=torch.float32)
    similar = similar if similar.ndim == 3 else similar.expand(heads, -1, -1)
    answer = select(
        similar.expand(layers, -1, -1, -1),
        scores=given,
        policy=Policy(budget, scorer="given", graph=None if graph is None else Graph(**graph), **fields),
        outputs=outputs,
        pinned=list(pinned),
    )
    assert isinstance(answer, Selection)
    return answer


def listed(array: Any) -> Any:
    """An array, or a list of them, as lists."""
    return [row.tolist() for row in array] if isinstance(array, list) else array.tolist()
