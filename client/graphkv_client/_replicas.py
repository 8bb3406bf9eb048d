"""Which replica a call goes to: who serves as far as is known, how busy each is, and who is left alone for now.

Of two replicas picked at random the less busy one is taken. Who serves is asked with Locate, of any replica; what it named
has to answer a probe before a call goes there, so that an address which cannot be reached from here costs no caller
anything: then the given address serves. Says which questions are due; asking them is for `_fleet` and `aio_fleet`, which
also guard this room. No socket; clock and randomness are injected.
"""

import heapq
import platform
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from graphkv_client._breaker import Breaker

__all__ = ["Errand", "Replica", "Replicas", "Seat", "is_near"]

MAX_REPLICAS = 16
"""Replicas that one client calls; of larger fleets a random part, so that not everybody is connected with everybody."""

_LOCATE_INTERVAL = 2.0
_SOONEST_LOCATE = 0.25
_UNANSWERED_INTERVAL = 60.0
_GIVEN_THRESHOLD = 3
_NEAR_BUSY = 0.8


@dataclass(frozen=True, slots=True)
class Seat:
    """One replica as Locate named it; `load`: the share of its bytes in flight that is taken."""

    replica: str
    address: str
    load: float


class Replica:
    """One address to call. `name`: its replica's, None where it was never told; `calls`: this client's own, running."""

    __slots__ = ("address", "breaker", "calls", "load", "name", "near", "paused_until")

    def __init__(self, address: str, breaker: Breaker, *, name: str | None = None) -> None:
        self.address = address
        self.breaker = breaker
        self.name = name
        self.near = False
        self.calls = 0
        self.load = 0.0
        self.paused_until = 0.0

    @property
    def busy(self) -> float:
        """Its load where it was seen last, and what this client has sent there since."""
        return self.calls + self.load


@dataclass(frozen=True, slots=True)
class Errand:
    """A question that is due: `locate`, or else a probe, which is `deep` where it shall do real work."""

    replica: Replica
    locate: bool = False
    deep: bool = False


class Replicas:
    """All that one client knows.

    Args:
        given: the address the client was made with.
        locate: whether to ask who serves.
        near: whether a seat is on this host.
    """

    def __init__(
        self,
        given: str,
        *,
        locate: bool,
        clock: Callable[[], float],
        chance: random.Random,
        near: Callable[[Seat], bool],
    ) -> None:
        self._clock = clock
        self._chance = chance
        self._near = near
        self._locates = locate
        self._salt = chance.random()
        self._next_locate = clock()
        self._last_locate = -_LOCATE_INTERVAL
        self._locating = False
        self._listed: list[Replica] = []
        self._part_of = 0  # the fleet that `_part_names` are a part of
        self._part_names: list[str] = []
        self.given = Replica(given, Breaker(clock, threshold=_GIVEN_THRESHOLD, jitter=chance.uniform))
        self.spread = False
        """Whether the given address stands for several hosts that gRPC spreads calls over."""
        self.located = not locate
        """Whether it is known who serves, or that nobody tells."""

    @property
    def all(self) -> list[Replica]:
        """The listed ones, and the given one."""
        return [*self._listed, *([] if self.given in self._listed else [self.given])]

    @property
    def ready(self) -> bool:
        """Whether one of those who serve can be called, as far as anybody was named."""
        return not self._listed or any(replica.breaker.closed for replica in self._listed)

    @property
    def hopeless(self) -> bool:
        """Whether nobody is thought to answer."""
        return not any(replica.breaker.closed for replica in self.all)

    def listed(self, replica: Replica) -> bool:
        """Whether it is among those who serve; of the given one nobody can tell."""
        return replica is self.given or replica in self._listed

    def choose(self, tried: Collection[Replica] = ()) -> Replica:
        """Where the next attempt of a call goes, which `tried` these already. There is always one: the given at last."""
        ready = [replica for replica in self._listed if replica.breaker.closed]
        fresh = [replica for replica in ready if replica not in tried]
        now = self._clock()
        eager = [replica for replica in fresh if replica.paused_until <= now]
        if fresh:
            return self._of_two(eager or fresh)
        given_is_fresh = self.given.breaker.closed and (self.spread or self.given not in tried)
        if ready and not given_is_fresh:
            return self._of_two(ready)
        return self.given

    def elsewhere(self, tried: Collection[Replica]) -> bool:
        """Whether a replica that was not tried would take a call now."""
        now = self._clock()
        ready = [replica for replica in self.all if replica.breaker.closed and replica.paused_until <= now]
        return any(replica not in tried or (replica is self.given and self.spread) for replica in ready)

    def failed(self, replica: Replica, *, deep: bool = False, silent: bool = False) -> None:
        """It did not answer, or said that it goes: it is left alone until a probe (`deep`: doing work) was answered.

        `silent`: there was no sign of it at all. Who serves is asked again soon.
        """
        if replica is self.given and not silent and not self.elsewhere((replica,)):
            replica.breaker.failed(deep=deep)  # there may be others behind the address
        else:
            replica.breaker.open(deep=deep or silent)
        self._locate_soon()

    def pause(self, replica: Replica, seconds: float) -> None:
        """It has too much to do: others first for so long."""
        replica.breaker.succeeded()
        replica.paused_until = max(replica.paused_until, self._clock() + seconds)

    def errands(self) -> list[Errand]:
        """The questions that are due now; each is due again only after its answer was told."""
        due = [Errand(replica, deep=replica.breaker.deep) for replica in self.all if replica.breaker.take_probe()]
        if self._locates and not self._locating and self._clock() >= self._next_locate:
            self._locating = True
            due.append(Errand(self._guide(), locate=True))
        return due

    def seats(self, seats: Sequence[Seat]) -> None:
        """Locate's answer."""
        self._asked(_LOCATE_INTERVAL)
        if self.spread and len(seats) == 1:  # a server without peers, of which the address has several
            seats = ()
        known = {(replica.name, replica.address): replica for replica in self._listed}
        listed = []
        for seat in self._part(seats):
            if seat.address == self.given.address:
                replica = self.given
            else:
                replica = known.get((seat.replica, seat.address)) or self._unproven(seat)
            replica.load, replica.near = seat.load, self._near(seat)
            listed.append(replica)
        self._listed = listed

    def nobody_tells(self) -> None:
        """Locate is not known there: the given address serves."""
        self._asked(_UNANSWERED_INTERVAL)
        self._listed = []

    def not_told(self) -> None:
        """Locate was not answered: another is asked soon."""
        self._asked(_SOONEST_LOCATE * 2)

    def probed(self, replica: Replica, name: str | None) -> None:
        """A probe's answer: which replica answered, None where none did."""
        replica.breaker.probed(name is not None and replica.name in (None, name))

    def _asked(self, again: float) -> None:
        self._locating = False
        self.located = True
        self._last_locate = self._clock()
        self._next_locate = self._last_locate + again * self._chance.uniform(0.75, 1.25)

    def _locate_soon(self) -> None:
        self._next_locate = min(self._next_locate, max(self._clock(), self._last_locate + _SOONEST_LOCATE))

    def _guide(self) -> Replica:
        """Who is asked who serves."""
        ready = [replica for replica in self._listed if replica.breaker.closed]
        return self._chance.choice(ready or self.all)  # who drains may still know the others

    def _unproven(self, seat: Seat) -> Replica:
        breaker = Breaker(self._clock, proven=False, jitter=self._chance.uniform)
        return Replica(seat.address, breaker, name=seat.replica)

    def _part(self, seats: Sequence[Seat]) -> Iterable[Seat]:
        """The seats this client deals with: those near, and of the others the same random ones every time."""
        if len(seats) <= MAX_REPLICAS:
            return seats
        lost = {replica.name for replica in self._listed if replica.breaker.proven and not replica.breaker.closed}
        named = {seat.replica: seat for seat in seats}
        fleet = hash((frozenset(named), frozenset(lost)))
        if fleet != self._part_of:
            part = heapq.nsmallest(MAX_REPLICAS, (seat for seat in seats if seat.replica not in lost), key=self._rank)
            back = (seat for seat in seats if seat.replica in lost)  # which may come back
            self._part_of, self._part_names = fleet, [seat.replica for seat in (*part, *back)]
        return [named[name] for name in self._part_names]

    def _rank(self, seat: Seat) -> tuple[bool, int]:
        return not self._near(seat), hash((self._salt, seat.replica))

    def _of_two(self, replicas: Sequence[Replica]) -> Replica:
        """The less busy of two picked at random; on this host first, unless those are nearly full."""
        pool = [replica for replica in replicas if replica.near and replica.load < _NEAR_BUSY] or replicas
        if len(pool) == 1:
            return pool[0]
        first, second = self._chance.sample(pool, 2)
        return first if first.busy <= second.busy else second


def is_near(seat: Seat) -> bool:
    """Whether the seat is on this host: replicas are named after theirs."""
    host = seat.address.rpartition(":")[0].strip("[]")
    own = platform.node()
    return host == own or (bool(own) and seat.replica.startswith(own + "-"))
