"""What a replica can do, as `client.capabilities()` answers it."""

from dataclasses import dataclass

__all__ = ["Capabilities"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """One replica's versions, names and limits.

    version: of the graphkv distribution; protocol_minor: of graphkv.v1. The name tuples are what policies and calls may use.
    max_bytes_in_flight: the bound on tensor bytes it holds at once; a layer larger than that can never be served.
    max_message_bytes: the largest single message it reads; the SDK sends chunks of `chunk_bytes`. device: "cpu" or a
    CUDA device with its name. metrics_address: host:port, empty where there is none.
    """

    version: str
    protocol_minor: int
    replica: str
    device: str
    max_bytes_in_flight: int
    max_message_bytes: int
    chunk_bytes: int
    metrics_address: str = ""
    features: tuple[str, ...] = ()
    scorers: tuple[str, ...] = ()
    budget_allocations: tuple[str, ...] = ()
    granularities: tuple[str, ...] = ()
    signals: tuple[str, ...] = ()
    updates: tuple[str, ...] = ()
    similarities: tuple[str, ...] = ()
    encodings: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
