"""Who chooses what is kept: every scorer of the catalogue, and on top of each the graph's settings.

A graph is named by one of GRAPHS, or by such a name and what differs: "default strength=0.5 threshold=0.95".
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from graphkv import Graph, Policy
from graphkv.terms.catalogue import SCORERS

__all__ = ["BASES", "CONTROL", "GRAPHS", "SINKS", "WINDOW", "Base", "Method", "graph_of", "methods", "policy_of"]

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
    """base None: one that needs no scores. graph None: the base alone; otherwise what `graph_of` knows."""

    name: str
    base: str | None = None
    graph: str | None = None


def graph_of(name: str | None) -> Graph | None:
    """The graph of a name; None for the base alone. Raises ValueError for a name that says nothing."""
    if name is None:
        return None
    for known in sorted(GRAPHS, key=len, reverse=True):
        graph, rest = GRAPHS[known], name.removeprefix(known)
        if graph is None or rest == name or rest[:1] not in ("", " "):
            continue
        fields = dict(part.split("=", 1) for part in rest.split())
        return dataclasses.replace(graph, **{field: _value(text) for field, text in fields.items()})
    raise ValueError(f"{name!r} begins with none of {', '.join(GRAPHS)}")


def _value(text: str) -> float | int | str | None:
    """A number or null as in JSON; anything else is a name."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def methods(bases: Iterable[str], also: Iterable[str] = ()) -> list[Method]:
    """Random, last, and each base with every graph and those in `also`; the full cache is judged apart, once a prompt."""
    found = [Method("random"), Method("last tokens")]
    for base in bases:
        found.append(Method(base, base))
        found += [Method(f"{base} + {graph}", base, graph) for graph in (*GRAPHS, *also)]
    return found


def policy_of(base: Base, budget: int, graph: Graph | None) -> Policy:
    """All keep the first 4 and the last 32 tokens, so that nothing but the choice differs."""
    return Policy(budget, scorer=base.scorer, budget_allocation=base.allocation, window=WINDOW, sinks=SINKS, graph=graph)
