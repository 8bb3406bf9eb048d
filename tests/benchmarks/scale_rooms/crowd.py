"""Many callers and many replicas on a simulated clock: the client's own rooms choose, retry and ask who serves.

A replica works on one call at a time, first come first served, and refuses what is beyond its room, as the real one does.
Callers think, call, wait, think again. Loads are as old in Locate's answer as the directory lets them become.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from graphkv_client._replicas import Replica, Replicas, Seat
from graphkv_client._retry import Budget, Tries
from graphkv_proto import v1 as pb

from graphkv.terms.errors import GraphKVError, OverloadedError, UnavailableError

__all__ = ["Outcome", "Settings", "simulated"]

_WAY = 0.0002
_LOOK = 0.1


@dataclass(frozen=True)
class Settings:
    """One run. `busy`: share of the fleet's time that is asked for; `strategy`: two choices (ours), random or least loaded.

    `killed`: share of the replicas that die half-way, which the directory notices after `noticed` seconds.
    """

    replicas: int
    callers: int
    times: list[float]
    size: int
    busy: float
    strategy: str = "two choices"
    seconds: float = 20.0
    room: int = 64
    stale: float = 0.5
    killed: float = 0.0
    noticed: float = 2.0
    seed: int = 1


@dataclass
class Outcome:
    """What came of it; the first fifth of the time does not count."""

    calls: int = 0
    failed: int = 0
    attempts: int = 0
    refused: int = 0
    locates: int = 0
    locate_bytes: int = 0
    waits: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Of the calls' durations."""
        ordered = sorted(self.waits)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    @property
    def imbalance(self) -> float:
        """The busiest replica's time over the mean's."""
        return max(self.used) / (sum(self.used) / len(self.used))


class _Server:
    def __init__(self, world: "_World", number: int) -> None:
        self.world = world
        self.seat = Seat(f"r{number}", f"r{number}:1", 0.0)
        self.waiting: deque[tuple[float, Callable[[GraphKVError | None], None]]] = deque()
        self.working = False
        self.alive = True
        self.listed = True
        self.used = 0.0

    @property
    def held(self) -> int:
        return len(self.waiting) + self.working

    def take(self, took: float, answer: Callable[[GraphKVError | None], None]) -> None:
        if not self.alive:
            self.world.after(_WAY, answer, UnavailableError("gone"))
        elif self.held >= self.world.given.room:
            self.world.count.refused += 1
            self.world.after(_WAY, answer, OverloadedError("full", retry_after=0.5))
        else:
            self.waiting.append((took, answer))
            self._next()

    def die(self) -> None:
        self.alive = False
        for _, answer in self.waiting:
            self.world.after(_WAY, answer, UnavailableError("gone"))
        self.waiting.clear()

    def _next(self) -> None:
        if self.working or not self.waiting:
            return
        took, answer = self.waiting.popleft()
        self.working = True
        self.world.after(took, self._done, took, answer)

    def _done(self, took: float, answer: Callable[[GraphKVError | None], None]) -> None:
        self.working = False
        if self.world.counting:
            self.used += took
        self.world.after(_WAY, answer, None if self.alive else UnavailableError("gone"))
        if self.alive:
            self._next()


class _Caller:
    def __init__(self, world: "_World", number: int) -> None:
        self.world = world
        self.chance = random.Random(f"{world.given.seed} {number}")
        self.budget = Budget()
        self.known = Replicas("given:1", locate=True, clock=world.clock, chance=self.chance, near=lambda seat: False)

    def think(self) -> None:
        self.world.after(self.chance.expovariate(1 / self.world.thinking), self.call)

    def call(self) -> None:
        tries = Tries(30.0, self.budget, max_attempts=4, clock=self.world.clock, jitter=self.chance.uniform)
        self.attempt(tries, self.world.now, self.chance.choice(self.world.given.times))

    def attempt(self, tries: Tries, started: float, took: float) -> None:
        self.ask()
        replica = self._choose(tries)
        tries.begin()
        tries.tried.append(replica)
        replica.calls += 1
        server = self.world.by_address[replica.address]

        def answered(error: GraphKVError | None) -> None:
            replica.calls -= 1
            if error is None:
                replica.breaker.succeeded()
                self.world.ended(started, tries.attempts, failed=False)
                self.think()
                return
            if isinstance(error, OverloadedError):
                self.known.pause(replica, error.retry_after or 0.5)
            else:
                self.known.failed(replica)
            pause = tries.after(error, elsewhere=self.known.elsewhere(tries.tried))
            if pause is None:
                self.world.ended(started, tries.attempts, failed=True)
                self.think()
            else:
                self.world.after(max(pause, _LOOK if isinstance(error, UnavailableError) and pause else 0.0), again)

        def again() -> None:
            self.attempt(tries, started, took)

        self.world.after(_WAY, server.take, took, answered)

    def ask(self) -> None:
        """The questions that are due, as the client's thread asks them beside its calls."""
        for _ in range(2):
            for errand in self.known.errands():
                if errand.locate:
                    self.known.seats(self.world.located())
                else:
                    server = self.world.by_address[errand.replica.address]
                    self.known.probed(errand.replica, server.seat.replica if server.alive else None)

    def _choose(self, tries: Tries) -> Replica:
        strategy = self.world.given.strategy
        ready = [each for each in self.known.all if each.breaker.closed and each.name and each not in tries.tried]
        if strategy == "two choices" or not ready:
            return self.known.choose(tries.tried)
        return self.chance.choice(ready) if strategy == "random" else min(ready, key=lambda each: each.load)


class _World:
    def __init__(self, given: Settings) -> None:
        self.given = given
        self.now = 0.0
        self.count = Outcome()
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self.servers = [_Server(self, number) for number in range(given.replicas)]
        self.by_address = {server.seat.address: server for server in self.servers}
        self.by_address["given:1"] = self.servers[0]
        mean = sum(given.times) / len(given.times)
        self.thinking = max(1e-6, given.callers * mean / (given.busy * given.replicas) - mean)
        self._seen: list[Seat] = []
        self._seen_at = -1.0
        self._answer_bytes = 0

    def clock(self) -> float:
        return self.now

    @property
    def counting(self) -> bool:
        return self.now >= self.given.seconds / 5

    def after(self, seconds: float, what: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), what, arguments))

    def located(self) -> list[Seat]:
        if self.now - self._seen_at >= self.given.stale or not self._seen:
            self._seen_at = self.now
            room = self.given.room
            self._seen = [
                Seat(server.seat.replica, server.seat.address, server.held / room) for server in self.servers if server.listed
            ]
            self._seen.sort(key=lambda seat: seat.load)
            self._answer_bytes = _bytes_of(self._seen, self.given.size * room)
        if self.counting:
            self.count.locates += 1
            self.count.locate_bytes += self._answer_bytes
        return self._seen

    def ended(self, started: float, attempts: int, *, failed: bool) -> None:
        if self.counting:
            self.count.calls += 1
            self.count.attempts += attempts
            self.count.failed += failed
            self.count.waits.append(self.now - started)

    def run(self) -> Outcome:
        for number in range(self.given.callers):
            caller = _Caller(self, number)
            caller.think()  # as many calls a second from the start: thinking has no memory
        doomed = self.servers[1 : 1 + round(self.given.killed * len(self.servers))]
        for server in doomed:
            self.after(self.given.seconds / 2, server.die)
            self.after(self.given.seconds / 2 + self.given.noticed, _unlist, server)
        while self._events and self._events[0][0] <= self.given.seconds:
            self.now, _, what, arguments = heapq.heappop(self._events)
            what(*arguments)
        self.count.used = [server.used for server in self.servers if server not in doomed]
        return self.count


def _unlist(server: _Server) -> None:
    server.listed = False


def _bytes_of(seats: list[Seat], room: int) -> int:
    message = pb.LocateResponse()
    for seat in seats:  # names and addresses as long as real ones
        message.replicas.add(
            replica=f"gpu-node-{seat.replica:>6}-0123abcd",
            address=f"10.0.0.{seat.replica:>3}:50051",
            bytes_in_flight=int(seat.load * room),
            max_bytes_in_flight=room,
        )
    return message.ByteSize()


def simulated(given: Settings) -> Outcome:
    """Runs it."""
    return _World(given).run()
