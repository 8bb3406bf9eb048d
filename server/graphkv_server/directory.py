"""Directory: which replicas a caller may go to, as the Locate RPC answers it. Here: one replica that knows itself.

Others (a cluster) come with rooms of their own; the servicer and the replica know the protocol only.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc
from graphkv_proto import v1 as pb

__all__ = ["Directory", "Seat", "SingleReplica", "least_loaded", "rendezvous", "write_seats"]


@dataclass(frozen=True, slots=True)
class Seat:
    """One replica as seen a moment ago: its name, host:port, tensor bytes held and allowed, rows waiting for its engine.

    `serving`: it takes new calls. `draining`: it never will again. Neither: it answers, but its engine does not.
    """

    replica: str
    address: str
    bytes_in_flight: int
    max_bytes_in_flight: int
    queued_rows: int = 0
    metrics_address: str = ""
    serving: bool = True
    draining: bool = False

    @property
    def load(self) -> float:
        """The share of its bytes that are taken."""
        return self.bytes_in_flight / self.max_bytes_in_flight if self.max_bytes_in_flight else 1.0


class Directory(Protocol):
    """Who serves."""

    def handlers(self) -> Sequence[grpc.GenericRpcHandler]:
        """What the replica's server has to answer beside its own service, for the others."""
        ...

    async def join(self, seat: Callable[[], Seat]) -> None:
        """The replica listens; `seat` says how it is at any time."""
        ...

    async def leave(self) -> None:
        """The replica is gone."""
        ...

    def seats(self) -> list[Seat]:
        """The replicas that may be called, the least loaded first."""
        ...

    async def locate(self, group: str, limit: int) -> list[Seat]:
        """The replicas for a call, the least loaded first, at most `limit` (0 = all); for a shard `group` one alone."""
        ...


class SingleReplica:
    """The directory of a replica without peers: itself, as long as it serves."""

    def __init__(self) -> None:
        self._seat: Callable[[], Seat] | None = None

    def handlers(self) -> Sequence[grpc.GenericRpcHandler]:
        """None: there is nobody to answer."""
        return ()

    async def join(self, seat: Callable[[], Seat]) -> None:
        """From now on there is somebody."""
        self._seat = seat

    async def leave(self) -> None:
        """Nobody again."""
        self._seat = None

    def seats(self) -> list[Seat]:
        """This replica, unless it drains."""
        if self._seat is None:
            return []
        seat = self._seat()
        return [] if seat.draining else [seat]

    async def locate(self, group: str, limit: int) -> list[Seat]:
        """This replica, for every group."""
        return self.seats()


def least_loaded(seats: Iterable[Seat], random_: random.Random) -> list[Seat]:
    """By load; replicas that are equally loaded in any order, so that not every caller goes to the same."""
    return sorted(seats, key=lambda seat: (seat.load, random_.random()))


def rendezvous(key: str, addresses: Iterable[str]) -> list[str]:
    """The addresses by their rank for `key` (highest random weight).

    Who asks with the same list gets the same order; an address that comes or goes moves only the keys that are its own.
    """
    return sorted(addresses, key=lambda address: hashlib.blake2b(f"{key} {address}".encode(), digest_size=8).digest())


def write_seats(seats: Iterable[Seat]) -> pb.LocateResponse:
    """The answer to Locate."""
    return pb.LocateResponse(
        replicas=[
            pb.Replica(
                replica=seat.replica,
                address=seat.address,
                bytes_in_flight=seat.bytes_in_flight,
                max_bytes_in_flight=seat.max_bytes_in_flight,
            )
            for seat in seats
        ]
    )
