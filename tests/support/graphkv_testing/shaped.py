"""Cases of every shape that an answer may have, and what must be equal of two answers, whatever the kind of their arrays."""

import contextlib
import itertools
from typing import Any

import numpy as np
import torch

from graphkv.terms.catalogue import OUTPUTS
from graphkv.terms.errors import InvalidInputError
from graphkv.terms.needs import check_outputs
from graphkv.terms.policy import Policy
from graphkv_testing.spec import Spec

__all__ = ["SHAPES", "outputs_of", "plain", "shaped"]

GRAPHS: dict[str, Any] = {
    "base": None,
    "all": (("neighbors", "auto"), ("threshold", 0.0), ("candidates", None)),
    "candidates": (("neighbors", "auto"), ("threshold", 0.3), ("candidates", 1.5)),
    "sequential": (("update", "sequential"), ("strength", 0.5), ("candidates", 2)),
}
SHAPES: dict[str, dict[str, Any]] = {
    "layer": {"granularity": "layer"},
    "layer-max": {"granularity": "layer", "combine": "max", "sinks": 2},
    "model": {"granularity": "model"},
    "pages": {"page_size": 3},
    "layer-pages": {"granularity": "layer", "page_size": 5, "combine": "max"},
    "model-pages": {"granularity": "model", "page_size": 4},
    "adaptive": {"budget_allocation": "adaptive_heads"},
    "adaptive-unsafe": {"budget_allocation": "adaptive_heads", "options": (("alpha", 0.0),)},
    "cake": {"budget_allocation": "cake"},
    "cake-layer": {"budget_allocation": "cake", "granularity": "layer"},
    "cake-knorm": {"budget_allocation": "cake", "scorer": "knorm"},
    "cake-pages": {"budget_allocation": "cake", "scorer": "cake", "page_size": 4},
    "pyramid-layer": {"budget_allocation": "pyramid", "granularity": "layer"},
}


def shaped() -> list[Spec]:
    """Every shape of answer under every kind of graph; their sources of importance take turns."""
    specs = []
    for place, (shape, graph) in enumerate(itertools.product(SHAPES, GRAPHS)):
        sources = ("queries", "attention") if "cake" in shape else ("queries", "attention", "scores")
        fields = {"budget": 17, "window": 4, **SHAPES[shape]}
        specs.append(
            Spec(
                name=f"{shape}-{graph}",
                tokens=61,
                layers=3,
                kv_heads=3,
                group=2,
                importance=sources[place % len(sources)],
                scores="padded",
                policy=tuple(fields.items()),
                graph=GRAPHS[graph],
                pinned=((20, 23),) if place % 2 else (),
                seed=5000 + place,
            )
        )
    return specs


def plain(layers: Any) -> list[tuple[object, ...]]:
    """All that must be equal, whatever the kind of array."""
    rows: list[tuple[object, ...]] = []
    for layer in sorted(layers, key=lambda own: own.layer):
        indices = [torch.as_tensor(row).tolist() for row in layer.rows]
        ragged = isinstance(layer.indices, list)
        measured = (layer.kept_score_ratio, layer.changed, layer.importance, layer.fingerprint)
        rows.append((layer.layer, layer.granularity, layer.page_size, ragged, indices, *measured, _bits(layer.outputs)))
    return rows


def _bits(outputs: Any) -> dict[str, tuple[object, ...]]:
    arrays = {name: np.ascontiguousarray(torch.as_tensor(array).cpu().numpy()) for name, array in outputs.items()}
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items()}


def outputs_of(policy: Policy, turn: int) -> list[str]:
    """In turn: nothing, all that the policy can give but what needs all scores, and all."""
    names: list[str] = []
    for name in OUTPUTS if turn % 3 else ():
        with contextlib.suppress(InvalidInputError):
            names += check_outputs(policy, [name])
    return names if turn % 3 == 2 else [name for name in names if name != "updated_scores"]
