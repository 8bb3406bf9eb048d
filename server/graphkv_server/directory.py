"""Directory: which replicas a caller may go to, as the Locate RPC answers it. Here: one replica that knows itself.

Others (a cluster) come with rooms of their own; the servicer knows the protocol only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Directory", "Seat", "SingleReplica"]


@dataclass(frozen=True, slots=True)
class Seat:
    """One replica as seen a moment ago: its name, host:port, and tensor bytes held and allowed."""

    replica: str
    address: str
    bytes_in_flight: int
    max_bytes_in_flight: int


class Directory(Protocol):
    """Who serves."""

    async def locate(self, group: str, limit: int) -> list[Seat]:
        """The replicas for a call, the least loaded first, at most `limit` (0 = all); for a shard `group` one alone."""
        ...


class SingleReplica:
    """The directory of a replica without peers: itself."""

    def __init__(self, seat: Callable[[], Seat]) -> None:
        self._seat = seat

    async def locate(self, group: str, limit: int) -> list[Seat]:
        """This replica, for every group."""
        return [self._seat()]
