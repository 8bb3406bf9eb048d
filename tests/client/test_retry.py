"""May a call be sent again, and when: by error, by attempts, by time, and within the budget."""

import random

import pytest
from graphkv_client._progress import Progress, Verdict
from graphkv_client._retry import Budget, Tries

from graphkv.terms.errors import (
    AccessError,
    DeadlineError,
    GraphKVError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    Reason,
    UnavailableError,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def tries(clock: Clock, limit: float = 30.0, *, budget: Budget | None = None, max_attempts: int = 4) -> Tries:
    found = Tries(limit, budget or Budget(), max_attempts=max_attempts, clock=clock, jitter=random.Random(1).uniform)
    found.begin()
    return found


def test_an_unavailable_replica_is_left_for_another_at_once_three_times(clock: Clock) -> None:
    call = tries(clock, max_attempts=10)
    for _ in range(3):
        assert call.after(UnavailableError("gone"), elsewhere=True) == 0.0
        call.begin()
    assert call.after(UnavailableError("gone"), elsewhere=True) is None


def test_moving_on_costs_nothing_of_the_budget(clock: Clock) -> None:
    budget = Budget()
    for _ in range(50):
        call = tries(clock, budget=budget)
        for _ in range(3):
            assert call.after(UnavailableError("gone", reason=Reason.DRAINING), elsewhere=True) == 0.0
            call.begin()
    assert budget.take()


def test_without_another_replica_the_pauses_grow(clock: Clock) -> None:
    call = tries(clock)
    pauses = []
    for _ in range(3):
        pause = call.after(UnavailableError("gone"), elsewhere=False)
        assert pause is not None
        pauses.append(pause)
        call.begin()
    assert 0.05 <= pauses[0] <= 0.1
    assert 0.2 <= pauses[1] <= 0.4
    assert 0.8 <= pauses[2] <= 1.6


@pytest.mark.parametrize(
    "error",
    [
        InvalidInputError("wrong"),
        AccessError("no"),
        InternalError("oops"),
        DeadlineError("late"),
        DeadlineError("slow", reason=Reason.SLOW_CLIENT),
        UnavailableError("for good", retryable=False),
        OverloadedError("for good", retryable=False),
        GraphKVError("anything"),
    ],
    ids=lambda error: f"{type(error).__name__}-{error.reason}-{error.retryable}",
)
def test_other_errors_are_the_answer(clock: Clock, error: GraphKVError) -> None:
    assert tries(clock).after(error, elsewhere=True) is None


def test_a_broken_checksum_is_sent_again_once(clock: Clock) -> None:
    call = tries(clock)
    error = UnavailableError("bits", reason=Reason.CHECKSUM)
    assert call.after(error, elsewhere=False) == 0.0
    call.begin()
    assert call.after(error, elsewhere=True) is None


def test_a_refusal_is_heeded_for_as_long_as_it_says(clock: Clock) -> None:
    pause = tries(clock).after(OverloadedError("full", retry_after=2.0), elsewhere=False)
    assert pause is not None
    assert 2.0 <= pause <= 2.5


def test_another_replica_is_asked_sooner(clock: Clock) -> None:
    pause = tries(clock).after(OverloadedError("full", retry_after=2.0), elsewhere=True)
    assert pause is not None
    assert pause <= 0.05


def test_a_pause_beyond_the_time_left_is_no_retry_and_costs_nothing(clock: Clock) -> None:
    budget = Budget()
    call = tries(clock, limit=1.0, budget=budget)
    assert call.after(OverloadedError("full", retry_after=2.0), elsewhere=False) is None
    assert budget.take()
    late = tries(clock, limit=1.0)
    clock.now += 1.0
    assert late.after(UnavailableError("gone"), elsewhere=True) is None


def test_max_attempts_is_the_end(clock: Clock) -> None:
    assert tries(clock, max_attempts=1).after(UnavailableError("gone"), elsewhere=True) is None
    call = tries(clock, max_attempts=2)
    assert call.after(UnavailableError("gone"), elsewhere=True) == 0.0
    call.begin()
    assert call.after(UnavailableError("gone"), elsewhere=True) is None
    assert call.attempts == 2


@pytest.mark.parametrize("clients", [1, 3, 10])
@pytest.mark.parametrize("warm", [0, 500])
def test_a_storm_of_a_thousand_refused_calls_makes_at_most_1100_attempts(clock: Clock, clients: int, warm: int) -> None:
    budgets = [Budget() for _ in range(clients)]
    for _ in range(warm):
        for budget in budgets:
            budget.called()
    attempts = 0
    for number in range(1000):
        call = tries(clock, budget=budgets[number % clients])
        while call.after(OverloadedError("full", retry_after=0.1), elsewhere=number % 2 == 0) is not None:
            call.begin()
        attempts += call.attempts
    assert 1000 + 80 < attempts <= 1100


def test_the_first_refused_call_of_a_client_has_one_retry(clock: Clock) -> None:
    call = tries(clock)
    assert call.after(OverloadedError("full"), elsewhere=False) is not None
    call.begin()
    assert call.after(OverloadedError("full"), elsewhere=False) is None


def test_leaving_a_dead_replica_is_free_and_a_slow_one_is_paid(clock: Clock) -> None:
    budget = Budget()
    call = tries(clock, budget=budget)
    assert call.may_leave(paid=False)
    assert call.after(UnavailableError("silent"), elsewhere=True) == 0.0
    call.begin()
    assert call.may_leave(paid=True)
    assert call.after(DeadlineError("slow"), elsewhere=True, paid=True) == 0.0
    call.begin()
    assert not call.may_leave(paid=True), "the budget is spent"
    assert call.may_leave(paid=False)


def test_nobody_leaves_at_the_last_attempt_or_after_the_end(clock: Clock) -> None:
    assert not tries(clock, max_attempts=1).may_leave(paid=False)
    call = tries(clock, limit=1.0)
    clock.now += 1.0
    assert not call.may_leave(paid=False)


def test_silence_is_judged_only_when_it_is_the_replicas_turn(clock: Clock) -> None:
    progress = Progress(4.0, clock)
    progress.ours()
    clock.now += 100
    assert progress.verdict() is Verdict.MOVING
    progress.moved()
    assert progress.verdict() is Verdict.MOVING
    clock.now += 2.0
    assert progress.verdict() is Verdict.ASK
    assert progress.verdict() is Verdict.MOVING, "it is asked once"
    clock.now += 2.0
    assert progress.verdict() is Verdict.DEAD


def test_who_says_that_it_is_there_is_slow(clock: Clock) -> None:
    progress = Progress(4.0, clock)
    clock.now += 2.0
    assert progress.verdict() is Verdict.ASK
    progress.there()
    clock.now += 2.0
    assert progress.verdict() is Verdict.SLOW
    progress.moved()
    assert progress.verdict() is Verdict.MOVING
    clock.now += 2.0
    assert progress.verdict() is Verdict.ASK, "a new silence is asked about anew"
    clock.now += 2.0
    assert progress.verdict() is Verdict.DEAD
