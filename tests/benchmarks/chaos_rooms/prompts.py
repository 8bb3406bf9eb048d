"""The prompts of a chaos run and their answers, in one file: made by a process that has torch, read by callers without it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from graphkv_client import Policy

__all__ = ["NAME", "Asked", "read", "write"]

NAME = "prompts.npz"
SHAPES = ((2, 2, 4, 131, 16), (1, 4, 8, 333, 32), (3, 1, 2, 77, 8), (2, 3, 6, 640, 64))
"""Layers, KV heads, query heads, tokens, head_dim."""
WINDOW = 32

Asked = tuple[dict[str, Any], list[np.ndarray]]
"""What `select` is given, and the indices of every layer that are right."""


def _policies() -> list[Policy]:
    return [Policy(40), Policy.paper(budget=16), Policy(0.25, graph=None), Policy(24, granularity="layer")]


def write(folder: Path) -> None:
    """Every shape with every policy, and what `graphkv.select` answers in this process."""
    import graphkv

    rng = np.random.default_rng(5)
    arrays: dict[str, np.ndarray] = {}
    policies = []
    for layers, heads, query_heads, tokens, dim in SHAPES:
        for policy in _policies():
            name = str(len(policies))
            keys = rng.standard_normal((layers, heads, tokens, dim), dtype=np.float32)
            queries = rng.standard_normal((layers, query_heads, WINDOW, dim), dtype=np.float32)
            chosen = graphkv.select(keys=keys, queries=queries, policy=policy)
            arrays |= {f"{name}.keys": keys, f"{name}.queries": queries}
            arrays |= {f"{name}.answer.{place}": np.asarray(own.indices) for place, own in enumerate(chosen.layers)}
            policies.append(policy.to_dict())
    np.savez(folder / NAME, policies=np.frombuffer(json.dumps(policies).encode(), np.uint8), **arrays)


def read(folder: Path) -> list[Asked]:
    """What `write` wrote."""
    with np.load(folder / NAME) as file:
        policies = [Policy.from_dict(one) for one in json.loads(file["policies"].tobytes())]
        found = []
        for name, policy in enumerate(policies):
            keys = file[f"{name}.keys"]
            given = {"keys": keys, "queries": file[f"{name}.queries"], "policy": policy}
            found.append((given, [file[f"{name}.answer.{layer}"] for layer in range(len(keys))]))
    return found
