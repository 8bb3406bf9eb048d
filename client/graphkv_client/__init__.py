"""The client of the GraphKV service: hand over a prompt's keys, get back which tokens to keep.

`CompressClient` and `AsyncCompressClient` have `select()` for what is there, `stream()` for a prefill that is still
running, `capabilities()` and `ping()`. Needs neither torch nor the server; torch tensors are welcome.
"""

from graphkv.terms.capabilities import Capabilities
from graphkv.terms.errors import (
    AccessError,
    DeadlineError,
    GraphKVError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    Reason,
    UnavailableError,
)
from graphkv.terms.policy import Graph, Policy
from graphkv.terms.rope import Rope
from graphkv.terms.selection import LayerSelection, Selection, Summary
from graphkv_client.aio import AsyncCompressClient
from graphkv_client.aio_stream import AsyncLayerStream
from graphkv_client.client import CompressClient
from graphkv_client.options import ClientOptions
from graphkv_client.stream import LayerStream

__all__ = [
    "AccessError",
    "AsyncCompressClient",
    "AsyncLayerStream",
    "Capabilities",
    "ClientOptions",
    "CompressClient",
    "DeadlineError",
    "Graph",
    "GraphKVError",
    "InternalError",
    "InvalidInputError",
    "LayerSelection",
    "LayerStream",
    "OverloadedError",
    "Policy",
    "Reason",
    "Rope",
    "Selection",
    "Summary",
    "UnavailableError",
]
