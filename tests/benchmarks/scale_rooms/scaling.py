"""The autoscaler on a simulated clock: the server's own policy under a day's curve, a flash crowd, and noise.

Replicas are a queue in steps of a second: what is asked waits, what there is room for is held, the rest is refused. What is
in flight is what waits, and as much as a queue with random arrivals and even service has at that use (Pollaczek, Khinchine).
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from graphkv_server.ray.autoscaling import Memory, Rule, decide, demand

__all__ = ["CURVES", "Rule", "Scaled", "scaled"]


@dataclass
class Scaled:
    """What came of it: replicas at least and at most, changes of their number, of them turns (up after down or down after
    up), the share of calls refused, the longest wait, and replica-hours had over those needed.
    """

    least: int
    most: int
    changes: int
    turns: int
    refused_ratio: float
    longest_wait: float
    hours_ratio: float
    recovered: float


def day(second: float) -> float:
    """Calls at night are a tenth of those at noon."""
    return 0.55 - 0.45 * math.cos(2 * math.pi * second / 86400)


def flash(second: float) -> float:
    """Five times the calls within ten seconds, for twenty minutes."""
    return 0.2 * (1 + 4 * min(1.0, max(0.0, (second - 1800) / 10)) * (1800 <= second < 3000))


def steady(second: float) -> float:
    """Half, for a day."""
    return 0.5


CURVES: dict[str, tuple[Callable[[float], float], int]] = {
    "a day": (day, 86400),
    "a flash crowd": (flash, 7200),
    "a steady day": (steady, 86400),
}


def scaled(
    curve: str, rule: Rule, *, peak: float, per_call: float, size: int, room_bytes: int, rows: int, start: float
) -> Scaled:
    """`peak`: calls a second at the curve's 1.0; `per_call`: seconds of a replica, `rows` and `size` (bytes) of a call.

    `start`: seconds until a new replica serves.
    """
    shape, length = CURVES[curve]
    chance = random.Random(1)
    memory = Memory()
    room = room_bytes / size
    target = math.ceil(max(1.0, shape(0) * peak * per_call / 0.5))
    starting: list[tuple[float, int]] = []
    serving, backlog = target, 0.0
    asked = refused = longest = had = needed = 0.0
    least, greatest, changes, turns, last, short_since, recovered = serving, serving, 0, 0, 0, None, 0.0
    for second in range(length):
        serving += sum(count for at, count in starting if at <= second)
        starting = [(at, count) for at, count in starting if at > second]
        mean = shape(second) * peak
        arrived = max(0.0, chance.gauss(mean, math.sqrt(mean)))
        served = serving / per_call
        backlog += arrived
        held = min(backlog, serving * room)
        refused += backlog - held
        asked += arrived
        backlog = max(0.0, held - served)
        used = min(0.95, mean / served)
        in_flight = min(serving * room, backlog + serving * (used + used * used / (2 - 2 * used)))
        wait = backlog / served
        longest = max(longest, wait)
        if wait > 1.0 and short_since is None:
            short_since = second
        if wait <= 1.0 and short_since is not None:
            recovered, short_since = max(recovered, float(second - short_since)), None
        ratio = in_flight * size / room_bytes
        wanted = demand(rule, [ratio], [in_flight * rows])
        decided = decide(rule, memory, float(second), target, wanted, complete=not starting)
        if decided != target:
            direction = 1 if decided > target else -1
            changes += 1
            turns += direction == -last
            last = direction
            if decided > target:
                starting.append((second + start, decided - target))
            else:
                serving = max(1, serving - (target - decided))
            target = decided
        least, greatest = min(least, serving), max(greatest, serving)
        had += target
        needed += max(1.0, mean * per_call)
    return Scaled(least, greatest, changes, turns, refused / asked, longest, had / needed, recovered)
