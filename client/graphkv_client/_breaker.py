"""Breaker: whether one replica may be called, judged by what came of calling it. No socket; the clock is injected.

Closed: calls go there. Open: none does, until a probe has shown that it answers again. Probes are sent beside the calls,
one at a time and at growing intervals, so that no caller's own call is ever the one that finds out.
"""

import random
from collections.abc import Callable

__all__ = ["Breaker"]

_FIRST_INTERVAL = 0.5
_LONGEST_INTERVAL = 30.0


class Breaker:
    """Of one replica. `threshold`: failures in a row that open it; `proven`: False for one that has to answer a probe first.

    `deep`: whether the next probe has to do real work, because the replica answered while its work stood still.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        threshold: int = 1,
        proven: bool = True,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._clock = clock
        self._threshold = threshold
        self._jitter = jitter
        self._failures = 0
        self._interval = _FIRST_INTERVAL
        self._next_probe = clock()
        self._probing = False
        self.closed = proven
        self.proven = proven
        self.deep = False

    def succeeded(self) -> None:
        """The replica answered a call, be it with an error of the caller's: it is there."""
        self.closed = self.proven = True
        self.deep = False
        self._failures = 0
        self._interval = _FIRST_INTERVAL

    def failed(self, *, deep: bool = False) -> None:
        """A call did not reach it, or got no sign of it."""
        self._failures += 1
        if self._failures >= self._threshold:
            self.open(deep=deep)

    def open(self, *, deep: bool = False) -> None:
        """No call from now on, whatever the threshold is."""
        self.deep = self.deep or deep
        if self.closed:
            self.closed = False
            self._wait()

    def take_probe(self) -> bool:
        """Whether a probe shall be sent now; it then counts as under way until `probed`."""
        due = not self.closed and not self._probing and self._clock() >= self._next_probe
        self._probing = self._probing or due
        return due

    def probed(self, answered: bool) -> None:
        """What came of the probe."""
        self._probing = False
        if answered:
            self.succeeded()
        else:
            self._wait()

    def _wait(self) -> None:
        self._next_probe = self._clock() + self._interval * self._jitter(0.75, 1.25)  # callers do not probe in step
        self._interval = min(2 * self._interval, _LONGEST_INTERVAL)
