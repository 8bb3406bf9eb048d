"""Progress: whether a call on its way moves, and whose turn it is. No socket, no thread; the clock is injected.

A call may be long for many reasons: a prefill that is not done, a long prompt, a busy replica. Only silence counts, and
only while it is the replica's turn. Half-way to the limit somebody asks the replica whether it is there at all.
"""

from collections.abc import Callable
from enum import Enum

__all__ = ["Progress", "Verdict"]


class Verdict(Enum):
    """What silence so far means."""

    MOVING = "moving"
    ASK = "ask"
    """Silent for half of the limit: ask whether the replica is there (once a silence)."""
    DEAD = "dead"
    """Silent for the limit, and it did not say that it is there."""
    SLOW = "slow"
    """Silent for the limit, but there."""


class Progress:
    """One attempt's. `limit`: seconds of silence it may take."""

    def __init__(self, limit: float, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._last = clock()
        self._ours = False
        self._asked = False
        self._there = False

    def ours(self) -> None:
        """The next message is being made: nothing can be expected of the replica."""
        self._ours = True

    def moved(self) -> None:
        """A message was handed over: now it is the replica's turn."""
        self._ours = False
        self.sign()

    def sign(self) -> None:
        """An answer came."""
        self._last = self._clock()
        self._asked = self._there = False

    def there(self) -> None:
        """The replica said that it is there."""
        self._there = True

    def verdict(self) -> Verdict:
        """How it looks now; ASK is said once a silence."""
        silent = 0.0 if self._ours else self._clock() - self._last
        if silent >= self._limit:
            return Verdict.SLOW if self._there else Verdict.DEAD
        if silent >= self._limit / 2 and not self._asked:
            self._asked = True
            return Verdict.ASK
        return Verdict.MOVING
