"""Policy, Graph and Rope as messages and back, without loss: what is read has the fingerprint of what was written.

A policy travels with every field stated, so that it means the same to two versions with different defaults; but for
options, where the catalogue's value stands for what is left out.
"""

from typing import Any

from graphkv.terms.catalogue import (
    BUDGETS,
    COMBINES,
    GRANULARITIES,
    OPTIONS,
    POOLINGS,
    SCORERS,
    SIGNALS,
    SIMILARITIES,
    UPDATES,
)
from graphkv.terms.errors import InvalidInputError, Reason, invalid
from graphkv.terms.policy import Graph, Policy
from graphkv.terms.rope import Rope
from graphkv_proto import v1 as pb
from graphkv_proto.messages import _names as names

__all__ = ["MAX_ROTARY_DIM", "read_policy", "read_rope", "write_policy", "write_rope"]

MAX_ROTARY_DIM = 2**16
"""No head is near that size; a message could hold a million frequencies."""
_MAX_INT64 = 2**63 - 1


def write_policy(policy: Policy) -> pb.Policy:
    """Raises InvalidInputError where a number is beyond the contract's int64."""
    ratio = isinstance(policy.budget, float)
    return pb.Policy(
        budget_ratio=policy.budget if ratio else None,
        budget_tokens=None if ratio else _int64("policy.budget", policy.budget),
        scorer=names.SCORER.label(policy.scorer, "policy.scorer"),
        budget_allocation=names.BUDGET_ALLOCATION.label(policy.budget_allocation, "policy.budget_allocation"),
        window=_int64("policy.window", policy.window),
        pool_width=_int64("policy.pool_width", policy.pool_width),
        pooling=names.POOLING.label(policy.pooling, "policy.pooling"),
        sinks=_int64("policy.sinks", policy.sinks),
        granularity=names.GRANULARITY.label(policy.granularity, "policy.granularity"),
        page_size=_int64("policy.page_size", policy.page_size),
        page_align=_int64("policy.page_align", policy.page_align),
        combine=names.COMBINE.label(policy.combine, "policy.combine"),
        options=dict(policy.options),
        graph=None if policy.graph is None else _write_graph(policy.graph),
    )


def read_policy(message: pb.Policy) -> Policy:
    """Raises InvalidInputError: BAD_POLICY, or UNKNOWN_NAME for what this version has not; paths begin with `policy`."""
    budget = message.WhichOneof("budget")
    if budget is None:
        raise invalid("policy.budget", None, "given: budget_tokens, or budget_ratio")
    for name in sorted(message.options):
        if name not in OPTIONS:
            names.refuse("policy.options", names.shown(name), f"one of {', '.join(sorted(OPTIONS))}")
    fields: dict[str, Any] = {
        "budget": getattr(message, budget),
        "scorer": names.SCORER.read(message.scorer, "policy.scorer", SCORERS),
        "budget_allocation": names.BUDGET_ALLOCATION.read(message.budget_allocation, "policy.budget_allocation", BUDGETS),
        "pooling": names.POOLING.read(message.pooling, "policy.pooling", POOLINGS),
        "granularity": names.GRANULARITY.read(message.granularity, "policy.granularity", GRANULARITIES),
        "combine": names.COMBINE.read(message.combine, "policy.combine", COMBINES),
    }
    for name in ("window", "pool_width", "sinks", "page_size", "page_align"):
        fields[name] = getattr(message, name) if message.HasField(name) else None
    try:
        graph = _read_graph(message.graph) if message.HasField("graph") else None
        return Policy(**fields, graph=graph, options=dict(message.options))
    except InvalidInputError as error:
        raise names.nested("policy", error) from None


def write_rope(rope: Rope) -> pb.Rope:
    """Frequencies travel as they are, in float64."""
    return pb.Rope(inv_freq=rope.inv_freq, rotary_dim=rope.rotary_dim, interleaved=rope.interleaved)


def read_rope(message: pb.Rope) -> Rope:
    """Raises InvalidInputError naming `rope.rotary_dim` or `rope.inv_freq`."""
    if not 2 <= message.rotary_dim <= MAX_ROTARY_DIM:
        raise invalid("rope.rotary_dim", message.rotary_dim, f"an even integer from 2 to {MAX_ROTARY_DIM}")
    if len(message.inv_freq) * 2 != message.rotary_dim:  # before a million of them are looked at
        given = f"{len(message.inv_freq)} values for rotary_dim {message.rotary_dim}"
        raise invalid("rope.inv_freq", given, "rotary_dim / 2 finite numbers")
    return Rope(tuple(message.inv_freq), message.rotary_dim, message.interleaved)


def _write_graph(graph: Graph) -> pb.Graph:
    counted = graph.neighbors if isinstance(graph.neighbors, int) else None
    return pb.Graph(
        source_ratio=graph.source_ratio,
        neighbors_auto=pb.NeighborsAuto() if graph.neighbors == "auto" else None,
        neighbors_count=_int64("policy.graph.neighbors", counted),
        threshold=graph.threshold,
        candidates=graph.candidates,
        similarity=names.SIMILARITY.label(graph.similarity, "policy.graph.similarity"),
        rounds=graph.rounds,
        strength=graph.strength,
        signal=names.SIGNAL.label(graph.signal, "policy.graph.signal"),
        update=names.UPDATE.label(graph.update, "policy.graph.update"),
    )


def _read_graph(message: pb.Graph) -> Graph:
    for name in ("source_ratio", "threshold", "rounds", "strength"):
        if not message.HasField(name):
            raise invalid(f"graph.{name}", None, "given: the wire has no defaults")
    kind = message.WhichOneof("neighbors")
    neighbors: Any = {"neighbors_auto": "auto", "neighbors_count": message.neighbors_count}.get(kind or "")
    return Graph(
        source_ratio=message.source_ratio,
        neighbors=neighbors,
        threshold=message.threshold,
        candidates=message.candidates if message.HasField("candidates") else None,
        similarity=names.SIMILARITY.read(message.similarity, "graph.similarity", SIMILARITIES),
        rounds=message.rounds,
        strength=message.strength,
        signal=names.SIGNAL.read(message.signal, "graph.signal", SIGNALS),
        update=names.UPDATE.read(message.update, "graph.update", UPDATES),
    )


def _int64(argument: str, value: int | float | None) -> int | None:
    if value is None:
        return None
    if value > _MAX_INT64:
        raise invalid(argument, value, f"at most {_MAX_INT64}", reason=Reason.TOO_LARGE)
    return int(value)
