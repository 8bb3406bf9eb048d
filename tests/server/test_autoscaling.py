"""How many replicas: steady load and waves change nothing, a step is followed once each way, and limits hold. No Ray."""

import itertools
import math
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from graphkv_server.ray.autoscaling import Memory, Policy, Rule, decide, demand
from hypothesis import given, settings
from hypothesis import strategies as st

HOUR = 3600


def simulated(rule: Rule, load: Callable[[float], float], *, start: int, seconds: int, begin: int = 0) -> list[int]:
    """The number of replicas after each second; a replica that was asked for is there 5 s later."""
    memory, replicas, there, due = Memory(), start, start, -1.0
    seen = []
    for now in range(begin, begin + seconds):
        if now >= due:
            there = replicas
        target = decide(rule, memory, float(now), replicas, load(now), complete=there >= replicas)
        if target != replicas:
            replicas, due = target, now + 5
            there = min(there, replicas)
        seen.append(replicas)
    return seen


def changes(seen: list[int]) -> list[int]:
    """The differences that are not zero."""
    return [after - before for before, after in itertools.pairwise(seen) if after != before]


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 40), st.integers(1, 32), st.integers(0, 9))
def test_a_constant_load_changes_the_number_once_at_most(load: float, start: int, seed: int) -> None:
    noise = random.Random(seed)
    rule = Rule(least=1, most=32)
    seen = simulated(rule, lambda now: load * noise.uniform(0.98, 1.02), start=start, seconds=HOUR)
    assert len(changes([start, *seen])) <= 1
    assert rule.least <= seen[-1] <= rule.most
    assert min(load, rule.most) <= 1.3 * seen[-1], "and what there is carries the load"


@settings(max_examples=40, deadline=None)
@given(st.floats(0.2, 30), st.floats(20, 2 * HOUR), st.floats(0, 2 * math.pi))
def test_waves_of_a_fifth_change_nothing(mean: float, period: float, phase: float) -> None:
    seen = simulated(
        Rule(least=1, most=64),
        lambda now: mean * (1 + 0.2 * math.sin(2 * math.pi * now / period + phase)),
        start=math.ceil(mean),
        seconds=2 * HOUR,
    )
    assert changes([math.ceil(mean), *seen]) == []


@settings(max_examples=20, deadline=None)
@given(st.floats(3.3, 4), st.floats(0.1, 0.7), st.integers(0, 9))
def test_a_step_is_followed_once_in_each_direction(high: float, low: float, seed: int) -> None:
    noise = random.Random(seed)

    def load(now: float) -> float:
        return (high if 600 <= now < 1800 else low) * noise.uniform(0.95, 1.05)

    seen = simulated(Rule(least=1, most=4), load, start=1, seconds=HOUR)
    assert max(seen) == 4
    assert seen[-1] == 1
    directions = [change > 0 for change in changes(seen)]
    assert directions == sorted(directions, reverse=True), "up, then down, and never back"
    assert seen[640] == 4, "within the delay and what starting takes"


def test_a_short_peak_adds_nothing_and_a_short_lull_takes_nothing() -> None:
    rule = Rule(least=1, most=8)
    peak = simulated(rule, lambda now: 6.0 if 400 <= now < 409 else 0.9, start=1, seconds=800)
    lull = simulated(rule, lambda now: 0.1 if 400 <= now < 690 else 3.9, start=4, seconds=900)
    assert changes(peak) == changes(lull) == []


def test_none_are_added_as_long_as_some_still_start() -> None:
    rule, memory = Rule(least=1, most=8, up_delay=2), Memory()
    counts = [decide(rule, memory, float(now), 4, 8.0, complete=False) for now in range(60)]
    assert set(counts) == {4}
    assert [decide(rule, memory, 60.0 + now, 4, 8.0) for now in range(3)] == [4, 4, 8]


@pytest.mark.parametrize(("replicas", "expected"), [(0, 2), (1, 2), (9, 6)])
def test_limits_that_changed_hold_at_once(replicas: int, expected: int) -> None:
    assert decide(Rule(least=2, most=6), Memory(), 0.0, replicas, 3.0) == expected


def test_the_larger_of_bytes_and_rows_counts() -> None:
    rule = Rule(target_bytes_ratio=0.5, target_rows=100)
    assert demand(rule, [0.5, 0.75], [10, 20]) == 2.5
    assert demand(rule, [0.1, 0.1], [300, 200]) == 5.0


@pytest.mark.parametrize(
    "fields",
    [{"least": 0}, {"least": 3, "most": 2}, {"target_bytes_ratio": 0}, {"target_bytes_ratio": 1.1}, {"target_rows": 0},
     {"up_delay": -1}, {"down_delay": math.nan}],
)  # fmt: skip
def test_a_bad_rule_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(reversed(fields))):
        Rule(**fields)  # type: ignore[arg-type]


def context(now: float, target: int, reported: dict[str, dict[str, float]], running: list[str]) -> SimpleNamespace:
    return SimpleNamespace(current_time=now, target_num_replicas=target, aggregated_metrics=reported, running_replicas=running)


def test_what_serve_calls_waits_for_every_replica_to_report() -> None:
    policy = Policy(least=1, most=4, up_delay=0, down_delay=0)
    full = {"bytes_ratio": {"a": 1.0}, "rows": {"a": 0.0}}
    assert policy(context(0.0, 1, {}, ["a"])) == (1, {})
    assert policy(context(1.0, 1, full, ["a", "b"])) == (1, {})
    assert policy(context(2.0, 1, full, ["a"])) == (2, {})
    assert policy(context(2.5, 2, full, ["a"])) == (2, {}), "once a second"
