"""May a call that failed be sent again, and when. No socket; clock and randomness are injected.

What decides: the class of the error, how often the call was sent, what is left of its time, and a budget that all calls of
a client share. A call that found no replica moves on to another for free, a few times; one that was refused for load, or
was slow, is sent again only from the budget, so that callers cannot make an overload worse than a tenth.
"""

import random
from collections.abc import Callable
from typing import Any

from graphkv.terms.errors import DeadlineError, GraphKVError, OverloadedError, Reason, UnavailableError

__all__ = ["Budget", "Tries"]

MAX_RESENDS = 3
"""Times that one call moves on because a replica was unavailable."""

_SHARE = 0.09
_RESERVE = 1.0
_OVERLOADED_PAUSE = 0.5
_FIRST_PAUSE, _PAUSE_GROWTH, _LONGEST_PAUSE = 0.1, 4.0, 2.0
_ELSEWHERE_PAUSE = 0.05


class Budget:
    """Retries after overload and slowness: nine for a hundred calls, and one to begin with.

    So a thousand calls of up to ten clients together make at most 1,100 attempts, however full the service is.
    """

    def __init__(self) -> None:
        self._left = _RESERVE

    def called(self) -> None:
        """A call began."""
        self._left = min(self._left + _SHARE, _RESERVE)

    def take(self) -> bool:
        """Whether one retry may be made; it is then spent."""
        allowed = self._left >= 1.0 - 1e-9  # eleven shares and more add up with rounding
        if allowed:
            self._left -= 1.0
        return allowed


class Tries:
    """The attempts of one call. `limit`: seconds it may take in all, from now; `max_attempts`: times it may be sent."""

    def __init__(
        self,
        limit: float,
        budget: Budget,
        *,
        max_attempts: int,
        clock: Callable[[], float],
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._deadline = clock() + limit
        self.limit = limit
        self._budget = budget
        self._max_attempts = max_attempts
        self._resends = 0
        self._corrupted = False
        self.attempts = 0
        self.tried: list[Any] = []
        """The replicas it was sent to."""
        budget.called()

    @property
    def remaining(self) -> float:
        """Seconds that are left; not positive once the time is over."""
        return self._deadline - self._clock()

    def begin(self) -> None:
        """The call is sent, again or for the first time."""
        self.attempts += 1

    def may_leave(self, *, paid: bool) -> bool:
        """Whether a running attempt may be given up for another. `paid`: it is slow, not gone, so the budget pays."""
        if self.attempts >= self._max_attempts or self.remaining <= 0:
            return False
        return self._budget.take() if paid else self._resends < MAX_RESENDS

    def after(self, error: GraphKVError, *, elsewhere: bool, paid: bool = False) -> float | None:
        """Seconds to wait before the next attempt; None where the error is the call's answer.

        elsewhere: whether a replica that was not tried is ready; paid: the budget has paid for this attempt's end already
        (`may_leave`).
        """
        if self.attempts >= self._max_attempts:
            return None
        pause = 0.0 if paid else self._pause(error, elsewhere)
        return pause if pause is not None and pause < self.remaining else None

    def _pause(self, error: GraphKVError, elsewhere: bool) -> float | None:
        if not error.retryable or isinstance(error, DeadlineError):
            return None
        if isinstance(error, OverloadedError):
            return self._after_refusal(error, elsewhere)
        if not isinstance(error, UnavailableError):
            return None
        if error.reason == Reason.CHECKSUM:
            again, self._corrupted = not self._corrupted, True
            return 0.0 if again else None
        if self._resends >= MAX_RESENDS:
            return None
        self._resends += 1
        if elsewhere:
            return 0.0
        longest = min(_FIRST_PAUSE * _PAUSE_GROWTH ** (self._resends - 1), _LONGEST_PAUSE)
        return self._jitter(longest / 2, longest)

    def _after_refusal(self, error: OverloadedError, elsewhere: bool) -> float | None:
        """The refusing replica is left alone for as long as it said; another is asked after a moment."""
        told = _OVERLOADED_PAUSE if error.retry_after is None else error.retry_after
        pause = (
            self._jitter(0.0, _ELSEWHERE_PAUSE) if elsewhere else told + self._jitter(0.0, _OVERLOADED_PAUSE * self.attempts)
        )
        if pause >= self.remaining or not self._budget.take():
            return None
        return pause
