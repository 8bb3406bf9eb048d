"""The algorithm of docs/algorithm.md once more: float64, plain numpy, loops where the text has steps.

Judges the library, so it must know nothing of it: only the words (`Policy`, `Rope`) are shared, and even their derived
numbers (budgets, counts of sources, always-kept tokens) are worked out again from the plain fields. Slow on purpose. This
file is the way from a prompt to its answers; the steps have files of their own.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphkv.terms.policy import Policy
from graphkv.terms.rope import Rope
from graphkv_testing import budgets_reference
from graphkv_testing.adaptive import share_heads
from graphkv_testing.coarse import coarse_states
from graphkv_testing.graph_steps import best_first, cosines, propagates, run_graph, unrotated
from graphkv_testing.importance import Importance, layer_attention, layer_importance
from graphkv_testing.states import CoarseState, LayerState, RowState

__all__ = ["SOURCES", "base_order", "select_prompt"]

SOURCES = ("queries", "attention", "scores", "query_mean", "query_covariance", "values", "similarity_keys", "positions")


def select_prompt(
    keys: Sequence[Any],
    *,
    policy: Policy,
    pinned: Sequence[tuple[int, int]] | None = None,
    rope: Rope | None = None,
    **given: Sequence[Any] | None,
) -> list[Any]:
    """The answers of one prompt; every argument has one entry a layer, shaped as `graphkv.select` wants them (`SOURCES`).

    A LayerState a layer; or a CoarseState a layer (one for all with the granularity model) where rows or pages share.
    """
    unknown = set(given) - set(SOURCES)
    if unknown:
        raise TypeError(f"unknown: {sorted(unknown)}")
    pinned, num_tokens = pinned or (), np.shape(keys[0])[1]
    own = [
        {name: np.asarray(layers[layer], dtype=np.float64) for name, layers in given.items() if layers is not None}
        for layer in range(len(keys))
    ]
    keys = [np.asarray(layer, dtype=np.float64) for layer in keys]
    caller_scores = given.get("scores") is not None
    window = budgets_reference.window_of(policy, caller_scores=caller_scores)
    received = [
        layer_attention(key, inputs.get("queries"), inputs.get("attention")) for key, inputs in zip(keys, own, strict=True)
    ]
    cake = None
    if policy.budget_allocation == "cake":
        cake = budgets_reference.cake(policy, [layer for layer in received if layer is not None], num_tokens, pinned)
    budgets = budgets_reference.layer_budgets(
        policy, num_tokens, len(keys), pinned, caller_scores=caller_scores, shares=None if cake is None else cake.shares
    )
    states = []
    for layer, (key, inputs, attention, budget) in enumerate(zip(keys, own, received, budgets, strict=True)):
        importance = _importance(policy, key, inputs, attention, min(window, num_tokens))
        sinks = budgets_reference.sinks_of(policy)
        always = budgets_reference.always_kept(num_tokens, budget, pinned=pinned, sinks=sinks, window=window)
        state = _layer(policy, layer, budget, key, importance, always, inputs, rope)
        state.cake = cake
        states.append(state)
    if policy.budget_allocation == "adaptive_heads":
        for state in states:
            share_heads(state)
    if policy.granularity == "head" and policy.page_size is None:
        return states
    pagings = [budgets_reference.paging(policy, num_tokens, budget, pinned=pinned, window=window) for budget in budgets]
    coarse: list[CoarseState] = coarse_states(states, pagings)
    return coarse


def _importance(
    policy: Policy, keys: np.ndarray, inputs: dict[str, np.ndarray], received: np.ndarray | None, window: int
) -> Importance:
    needed = ("queries", "scores", "query_mean", "query_covariance", "values")
    return layer_importance(policy, keys, window=window, received=received, **{name: inputs.get(name) for name in needed})


def _layer(
    policy: Policy,
    layer: int,
    budget: int,
    keys: np.ndarray,
    importance: Importance,
    always: list[int],
    inputs: dict[str, np.ndarray],
    rope: Rope | None,
) -> LayerState:
    """One layer with its own budget B: every row through the graph, and its own choice."""
    kv_heads, num_tokens, _ = keys.shape
    graph = policy.graph if policy.graph is not None and propagates(policy.graph) else None
    positions = inputs.get("positions", np.arange(num_tokens))
    where = np.broadcast_to(positions, (kv_heads, num_tokens))
    similar = inputs.get("similarity_keys")
    rows, kept_mass, all_mass, changed, turned_back = [], 0.0, 0.0, 0, False
    for head in range(kv_heads):
        row = _start_row(layer, head, num_tokens, budget, always, importance.values[head])
        row.base_kept = base_order(row)[: row.contended]
        chosen = row.base_kept
        if graph is not None and num_tokens > budget and row.contended > 0:
            vectors = keys[head]
            if graph.similarity == "pre_rope":
                if similar is not None:
                    vectors = similar[head]
                elif rope is not None:
                    vectors = unrotated(vectors, where[head], rope)
                    turned_back = True
            row.cosine, row.absolute = cosines(vectors)
            row.graph = run_graph(row.shifted, row.contenders, row.cosine, graph, budget=budget, contended=row.contended)
            chosen = row.graph.order
        row.kept = sorted([*always, *chosen])
        if num_tokens > budget:
            kept_mass += sum(float(row.shifted[j]) for j in chosen)
            all_mass += sum(float(row.shifted[j]) for j in row.contenders)
            changed += len(set(chosen) - set(row.base_kept))
        rows.append(row)
    ratio = kept_mass / all_mass if all_mass > 0 else 1.0
    vector_dim = keys.shape[-1] if similar is None else similar.shape[-1]
    return LayerState(layer, policy, budget, rows, importance, keys, vector_dim, turned_back, ratio, changed)


def base_order(row: RowState) -> list[int]:
    """The contenders as the base method ranks them."""
    return best_first(row.contenders, row.base)


def _start_row(layer: int, head: int, num_tokens: int, budget: int, always: list[int], base: np.ndarray) -> RowState:
    """Contenders and step 1."""
    outside = set(always)
    contenders = [j for j in range(num_tokens) if j not in outside and base[j] > -math.inf]
    least = min((base[j] for j in contenders), default=0.0)
    shifted = base - least if least < 0 else base.copy()
    return RowState(layer, head, num_tokens, budget, always, contenders, base, shifted, [], [])
