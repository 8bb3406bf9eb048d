"""GraphKV: which tokens of a KV cache to keep (arXiv:2509.00388), as a library.

`select(keys, queries=..., policy=...)` is the whole job in-process. torch is loaded at the first use of `select`; the
words shared with the client and the server (Policy, Graph, Rope, Selection, the errors) need only the standard library.
"""

from typing import TYPE_CHECKING, Any

from graphkv.terms.errors import (
    AccessError,
    DeadlineError,
    GraphKVError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
)
from graphkv.terms.policy import Graph, Policy
from graphkv.terms.rope import Rope
from graphkv.terms.selection import LayerSelection, Selection, Summary

if TYPE_CHECKING:
    from graphkv.algorithm import select

__all__ = [
    "AccessError",
    "DeadlineError",
    "Graph",
    "GraphKVError",
    "InternalError",
    "InvalidInputError",
    "LayerSelection",
    "OverloadedError",
    "Policy",
    "Rope",
    "Selection",
    "Summary",
    "UnavailableError",
    "__version__",
    "select",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "select":
        from graphkv.algorithm import select

        return select
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
