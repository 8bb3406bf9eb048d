"""Watch: what one process knows of the others, as probes answer or fail. Pure: no socket, no clock of its own, no task.

A replica is known by its address. It is lost when a probe finds nobody there, or when `misses` probes in a row had no
answer (it is frozen, or the network is); it is back with its next answer. Probes are counted, not seconds, so that a
process that was frozen itself does not take everybody else for lost when it wakes up.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from graphkv_server.directory import Seat, least_loaded, rendezvous

__all__ = ["FORGET_AFTER", "MISSES", "MOST", "Watch"]

MISSES = 5
"""Probes without an answer after which a replica is lost."""
FORGET_AFTER = 120.0
"""Seconds after which an address is forgotten that nobody names and nobody answers at."""
MOST = 32
"""Replicas that one process probes; with more of them each knows a different part, and hears of the rest."""


@dataclass(slots=True)
class _Peer:
    seat: Seat | None = None
    misses: int = 0
    named: float = 0.0

    @property
    def live(self) -> bool:
        return self.seat is not None and self.misses < MISSES


class Watch:
    """`own`: this process's address, never probed (empty where it is no replica). `most`: replicas to probe at most."""

    def __init__(self, own: str, clock: Callable[[], float], *, most: int = MOST, random_: random.Random | None = None) -> None:
        self._own = own
        self._clock = clock
        self._most = most
        self._random = random_ or random.Random()  # noqa: S311  # spreads load, keeps no secret
        self._peers: dict[str, _Peer] = {}

    def learn(self, addresses: Iterable[str]) -> None:
        """Somebody names these addresses."""
        now = self._clock()
        for address in addresses:
            if address and address != self._own:
                self._peers.setdefault(address, _Peer()).named = now

    def answered(self, address: str, seat: Seat, others: Iterable[str]) -> None:
        """A probe was answered: how the replica is, and whom it knows alive. Who drains is forgotten once it is gone."""
        peer = self._peers.setdefault(address, _Peer())
        peer.seat, peer.misses, peer.named = seat, 0, self._clock()
        self.learn(others)

    def failed(self, address: str, *, refused: bool) -> None:
        """A probe was not answered; `refused`: there is nobody at that address."""
        peer = self._peers.get(address)
        if peer is not None:
            peer.misses = MISSES if refused else peer.misses + 1

    def forget(self) -> list[str]:
        """Drops the addresses that are lost and not named any more, and tells which."""
        limit = self._clock() - FORGET_AFTER
        old = [address for address, peer in self._peers.items() if not peer.live and peer.named < limit]
        for address in old:
            del self._peers[address]
        return old

    def to_probe(self) -> list[str]:
        """The addresses that this process watches: all, or where there are many a part that is its own."""
        if len(self._peers) <= self._most:
            return list(self._peers)
        return rendezvous(self._own, self._peers)[: self._most]

    def unknown(self, address: str) -> bool:
        """Whether the address is neither known alive nor known to be lost."""
        peer = self._peers.get(address)
        return peer is not None and peer.seat is None and peer.misses < MISSES

    def live(self) -> list[Seat]:
        """Who answers, in whatever state; without this process itself."""
        return [peer.seat for peer in self._peers.values() if peer.seat is not None and peer.live]

    def seats(self, own: Seat | None) -> list[Seat]:
        """Who may be called, the least loaded first.

        Where no engine answers, those whose process does: a caller's try costs less than telling it that there is nobody.
        """
        answering = [seat for seat in (*self.live(), *((own,) if own is not None else ())) if not seat.draining]
        serving = [seat for seat in answering if seat.serving]
        return least_loaded(serving or answering, self._random)

    def ranked(self, group: str, own: Seat | None) -> list[str]:
        """Addresses for a shard group by rank: who may be called, and of whom nobody knows yet."""
        seats = {seat.address for seat in self.seats(own)}
        return rendezvous(group, seats | {address for address in self._peers if self.unknown(address)})
