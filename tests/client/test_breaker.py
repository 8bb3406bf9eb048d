"""The breaker of one replica: when it opens, how it is probed, what closes it."""

import pytest
from graphkv_client._breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def middle(low: float, high: float) -> float:
    return (low + high) / 2


def test_one_failure_opens_it_and_no_probe_is_due_at_once(clock: Clock) -> None:
    breaker = Breaker(clock, jitter=middle)
    assert breaker.closed
    breaker.failed()
    assert not breaker.closed
    assert not breaker.take_probe()


def test_a_threshold_counts_failures_in_a_row(clock: Clock) -> None:
    breaker = Breaker(clock, threshold=3, jitter=middle)
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        assert breaker.closed
        breaker.succeeded()
    for _ in range(3):
        breaker.failed()
    assert not breaker.closed


def test_one_probe_at_a_time_and_its_answer_closes(clock: Clock) -> None:
    breaker = Breaker(clock, jitter=middle)
    breaker.failed()
    clock.now += 0.5
    assert breaker.take_probe()
    clock.now += 100
    assert not breaker.take_probe(), "the first is still under way"
    breaker.probed(answered=True)
    assert breaker.closed


def test_probes_that_fail_come_at_growing_intervals_up_to_half_a_minute(clock: Clock) -> None:
    breaker = Breaker(clock, jitter=middle)
    breaker.failed()
    waits = []
    for _ in range(9):
        started = clock.now
        while not breaker.take_probe():
            clock.now += 0.125
        waits.append(clock.now - started)
        breaker.probed(answered=False)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    breaker.succeeded()
    breaker.failed()
    clock.now += 0.5
    assert breaker.take_probe(), "an answer starts the intervals anew"


def test_failures_of_calls_that_still_run_do_not_put_the_probe_off(clock: Clock) -> None:
    breaker = Breaker(clock, jitter=middle)
    breaker.failed()
    clock.now += 0.25
    breaker.failed()
    breaker.open()
    clock.now += 0.25
    assert breaker.take_probe()


def test_an_unproven_one_is_probed_first(clock: Clock) -> None:
    breaker = Breaker(clock, proven=False, jitter=middle)
    assert not breaker.closed
    assert not breaker.proven
    assert breaker.take_probe()
    breaker.probed(answered=True)
    assert breaker.closed
    assert breaker.proven


def test_it_remembers_that_the_probe_has_to_do_work(clock: Clock) -> None:
    breaker = Breaker(clock, jitter=middle)
    breaker.failed(deep=True)
    breaker.failed()
    assert breaker.deep
    breaker.succeeded()
    assert not breaker.deep


def test_callers_do_not_probe_in_step(clock: Clock) -> None:
    breakers = [Breaker(clock) for _ in range(20)]
    for breaker in breakers:
        breaker.failed()
    due = set()
    for _ in range(100):
        clock.now += 0.01
        due |= {(index, clock.now) for index, breaker in enumerate(breakers) if breaker.take_probe()}
    assert len(due) == 20
    assert len({moment for _, moment in due}) > 5
