"""Attempts: the calls of one client that are under way, where each goes, and what becomes of it. No socket, no thread.

What `_replicas` knows, `_retry` allows and `_progress` sees comes together here, the same for both clients; `_fleet` and
`aio_fleet` guard it, carry the messages and ask the questions.
"""

import random
import time
from collections.abc import Callable
from typing import Any

from graphkv.terms.errors import DeadlineError, GraphKVError, OverloadedError, Reason, UnavailableError
from graphkv_client._progress import Progress, Verdict
from graphkv_client._replicas import Replica, Replicas, is_near
from graphkv_client._retry import Budget, Tries
from graphkv_client.options import ClientOptions

__all__ = ["Attempt", "Attempts"]

_REFUSED_PAUSE = 0.5
"""Seconds that a replica is spared which refused a call and did not say for how long."""


class Attempt:
    """One sending of a call to one replica.

    `cancel`: what ends it, once it is on its way; `loss`: why we gave it up, if we did; `own_fault`: that it failed here.
    """

    __slots__ = ("call", "cancel", "line", "loss", "own_fault", "paid", "progress", "replica", "reported")

    def __init__(self, call: Tries, replica: Replica, progress: Progress, line: Any) -> None:
        self.call = call
        self.replica = replica
        self.progress = progress
        self.line = line
        self.cancel: Callable[[], Any] | None = None
        self.loss: GraphKVError | None = None
        self.own_fault = False
        self.paid = False
        self.reported = False

    def give_up(self, loss: GraphKVError) -> None:
        """Ends it from here."""
        self.loss = loss
        if self.cancel is not None:
            self.cancel()


class Attempts:
    """Of one client."""

    def __init__(
        self,
        options: ClientOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        self._options = options
        self._clock = clock
        self._chance = chance or random.Random()  # noqa: S311  # spreads calls, keeps no secret
        self._budget = Budget()
        self.replicas = Replicas(options.address, locate=options.locate, clock=clock, chance=self._chance, near=is_near)
        self.running: set[Attempt] = set()

    def call(self, limit: float) -> Tries:
        """A call that begins and may take `limit` seconds."""
        maximum = self._options.max_attempts
        return Tries(limit, self._budget, max_attempts=maximum, clock=self._clock, jitter=self._chance.uniform)

    def begin(self, call: Tries, line: Callable[[Replica], Any]) -> Attempt:
        """The next attempt of a call; `line` says how its replica is reached.

        Raises UnavailableError where no replica answers and the client has another way to answer.
        """
        if self._options.falls_back and self.replicas.hopeless:
            raise UnavailableError("no replica answers", retryable=False)
        replica = self.replicas.choose(call.tried)
        attempt = Attempt(call, replica, Progress(self._silence(call), self._clock), line(replica))
        call.begin()
        call.tried.append(replica)
        replica.calls += 1
        self.running.add(attempt)
        return attempt

    def patience(self, attempt: Attempt) -> float:
        """Seconds that a question may take which a replica answers at once."""
        return min(attempt.call.remaining, self._silence(attempt.call))

    def unanswered(self, attempt: Attempt, error: GraphKVError) -> GraphKVError:
        """The error of such a question: where the call has time left, the replica gave no sign of life."""
        if not isinstance(error, DeadlineError) or attempt.call.remaining <= 0:
            return error
        self._report(attempt)
        attempt.loss = self._dead(attempt)
        return attempt.loss

    def ended(self, attempt: Attempt, error: BaseException | None) -> None:
        """It is over: answered, or failed with an error. What is no GraphKVError, or was our own fault, tells nothing."""
        self.running.discard(attempt)
        replica = attempt.replica
        replica.calls -= 1
        if attempt.own_fault or not (error is None or isinstance(error, GraphKVError)):
            return
        if self._options.metrics is not None:
            self._options.metrics.attempted("ok" if error is None else error.reason)
        if attempt.loss is not None:
            if attempt.paid:
                self.replicas.pause(replica, self._silence(attempt.call))
        elif isinstance(error, OverloadedError):
            self.replicas.pause(replica, _REFUSED_PAUSE if error.retry_after is None else error.retry_after)
        elif isinstance(error, UnavailableError) and error.reason != Reason.CHECKSUM:
            self.replicas.failed(replica, deep=error.reason == Reason.DRAINING)
        elif isinstance(error, DeadlineError):
            if attempt.progress.verdict() is Verdict.DEAD:
                self._report(attempt)
        else:
            replica.breaker.succeeded()

    def pause(self, call: Tries, error: GraphKVError, attempt: Attempt | None) -> float | None:
        """Seconds until the call may be sent again; None where the error is its end."""
        if attempt is None or attempt.own_fault or (self._options.falls_back and self.replicas.hopeless):
            return None
        return call.after(error, elsewhere=self.replicas.elsewhere(call.tried), paid=attempt.paid)

    def look(self) -> list[Attempt]:
        """Gives up what is lost, and says whose replicas have to be asked whether they are there."""
        asked = []
        for attempt in list(self.running):
            verdict = attempt.progress.verdict()
            if attempt.loss is not None or verdict is Verdict.MOVING:
                continue
            if verdict is Verdict.ASK:
                asked.append(attempt)
            elif verdict is Verdict.DEAD or not self.replicas.listed(attempt.replica):
                self._leave_dead(attempt)
            else:
                self._leave_slow(attempt)
        return asked

    def _leave_dead(self, attempt: Attempt) -> None:
        self._report(attempt)
        other = self.replicas.elsewhere(attempt.call.tried) or self._options.falls_back
        if other and attempt.call.may_leave(paid=False):
            attempt.give_up(self._dead(attempt))

    def _dead(self, attempt: Attempt) -> UnavailableError:
        seconds = self._silence(attempt.call)
        return UnavailableError(f"{attempt.replica.address} gave no sign of life for {seconds:g} seconds")

    def _leave_slow(self, attempt: Attempt) -> None:
        """The budget pays, since whoever is busy does the work in vain."""
        if self.replicas.elsewhere(attempt.call.tried) and attempt.call.may_leave(paid=True):
            attempt.paid = True
            seconds = self._silence(attempt.call)
            attempt.give_up(DeadlineError(f"{attempt.replica.address} did nothing for the call for {seconds:g} seconds"))

    def _report(self, attempt: Attempt) -> None:
        if not attempt.reported:
            attempt.reported = True
            self.replicas.failed(attempt.replica, silent=True)

    def _silence(self, call: Tries) -> float:
        """Seconds of silence that an attempt may take: half of the call's time at most, so that another can follow."""
        return min(self._options.attempt_timeout, call.limit / 2)
