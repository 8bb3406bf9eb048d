"""How many replicas there should be: a policy over bytes and rows in flight, for Serve's autoscaler.

`decide` is pure: what it knows comes in, what it remembers goes out. Serve ships this module to its controller as it is,
so it imports the standard library alone.

The demand is counted in replicas: the larger of (bytes in flight, as shares of what a replica may hold) / `target_bytes_ratio`
and (rows in flight) / `target_rows`. Replicas are added once the demand has been above `UP` times their number for `up_delay`
seconds on end: as many as its mean over that time asks for. They are taken away once the demand has never been above `DOWN`
times a smaller number for `down_delay` seconds: down to the smallest such number. Between the two lies what waves of 20%
around any steady demand can do, so those change nothing.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DOWN", "UP", "Memory", "Policy", "Rule", "decide"]

UP = 1.25
"""Replicas are added above this demand a replica..."""
DOWN = 0.8
"""... and taken away where fewer would have at most this."""


@dataclass(frozen=True)
class Rule:
    """What the operator sets. Delays in seconds; `target_bytes_ratio` in (0, 1]."""

    least: int = 1
    most: int = 1
    target_bytes_ratio: float = 0.5
    target_rows: float = 2048.0
    up_delay: float = 10.0
    down_delay: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"least is {self.least} and most {self.most}; they must be 1 <= least <= most")
        if not 0 < self.target_bytes_ratio <= 1:
            raise ValueError(f"target_bytes_ratio is {self.target_bytes_ratio}; it must be in (0, 1]")
        if not self.target_rows > 0:
            raise ValueError(f"target_rows is {self.target_rows}; it must be above 0")
        if not (self.up_delay >= 0 and self.down_delay >= 0):
            raise ValueError(f"up_delay is {self.up_delay} and down_delay {self.down_delay}; they must be at least 0")


@dataclass
class Memory:
    """What a decision leaves for the next.

    `since`: when the replicas last changed. `peaks`: (time, demand) of the last `down_delay` seconds, without those that a
    later one is at least as high as: the first is the highest. `above`: demands since it was first too high, and when.
    """

    since: float | None = None
    peaks: deque[tuple[float, float]] = field(default_factory=deque)
    above_since: float | None = None
    above: list[float] = field(default_factory=list)


def demand(rule: Rule, bytes_ratios: list[float], rows: list[float]) -> float:
    """The load of all replicas together, counted in replicas that are at their target."""
    return max(sum(bytes_ratios) / rule.target_bytes_ratio, sum(rows) / rule.target_rows)


def decide(rule: Rule, memory: Memory, now: float, replicas: int, wanted: float, *, complete: bool = True) -> int:
    """The number of replicas from now on, where there should be `replicas` and the demand is `wanted`; updates `memory`.

    `complete`: all of them run. As long as some still start, none are added: what they will take is not seen yet.
    """
    if memory.since is None:
        memory.since = now
    if not rule.least <= replicas <= rule.most:
        return _changed(memory, now, min(max(replicas, rule.least), rule.most))
    while memory.peaks and memory.peaks[-1][1] <= wanted:
        memory.peaks.pop()
    memory.peaks.append((now, wanted))
    while memory.peaks[0][0] < now - rule.down_delay:
        memory.peaks.popleft()
    if wanted > UP * replicas and complete:
        if memory.above_since is None:
            memory.above_since = now
        memory.above.append(wanted)
        if now - memory.above_since >= rule.up_delay and replicas < rule.most:
            target = math.ceil(sum(memory.above) / len(memory.above))
            return _changed(memory, now, min(max(target, replicas + 1), rule.most))
        return replicas
    memory.above_since, memory.above = None, []
    if now - memory.since >= rule.down_delay:
        target = max(rule.least, math.ceil(memory.peaks[0][1] / DOWN - 1e-9))
        if target < replicas:
            return _changed(memory, now, target)
    return replicas


def _changed(memory: Memory, now: float, target: int) -> int:
    """After a change the replicas are others, and so is what was seen: all of it begins anew."""
    memory.since, memory.peaks, memory.above_since, memory.above = now, deque(), None, []
    return target


class Policy:
    """What Serve calls, about ten times a second. Remembers between calls; a controller that was replaced begins anew.

    A replica reports its own numbers (`record_autoscaling_stats`); as long as one of them has not, nothing is changed.
    """

    def __init__(self, **rule: Any) -> None:
        self._rule = Rule(**rule)
        self._memory = Memory()
        self._decided_at = -math.inf

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The target number of replicas, and nothing to remember for Serve: (int, {})."""
        now, target = float(context.current_time), int(context.target_num_replicas)
        if now - self._decided_at < 1.0:
            return target, {}
        reported = context.aggregated_metrics or {}
        ratios, rows = reported.get("bytes_ratio", {}), reported.get("rows", {})
        running = list(context.running_replicas)
        if not running or any(one not in ratios for one in running):
            return target, {}
        self._decided_at = now
        wanted = demand(self._rule, [ratios[one] for one in running], [rows.get(one, 0.0) for one in running])
        return decide(self._rule, self._memory, now, target, wanted, complete=len(running) >= target), {}
