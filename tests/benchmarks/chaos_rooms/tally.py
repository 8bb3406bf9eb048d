"""What the callers saw: counts, latency, and for each kind of fault how long it took from those it reached."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Called", "Fault", "Tally", "quantile"]

_AFTER = 3.0
"""Seconds after a fault in which a call that was sent again is held to be sent again for it."""


@dataclass(frozen=True)
class Called:
    """One call. Times in seconds of the system's monotonic clock; `attempts` is 0 and `error` is set where it failed."""

    caller: str
    start: float
    end: float
    attempts: int
    where: str
    error: str


@dataclass
class Fault:
    """One thing that happened, from `at` to `until`. `out_after`: until nobody is sent there; `recovered_after`: until
    everything is as before. None: it never was, or does not apply."""

    kind: str
    at: float
    until: float
    out_after: float | None = None
    recovered_after: float | None = None
    note: str = ""


def quantile(values: Iterable[float], share: float) -> float:
    """The value that `share` of the values are at or below; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass
class Tally:
    """All calls and all faults of a run."""

    calls: Sequence[Called]
    faults: Sequence[Fault]
    left: Sequence[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """What callers saw that was no answer, or not the right one."""
        return [one.error for one in self.calls if one.error]

    @property
    def retries(self) -> int:
        """Sendings beyond the first of each answered call."""
        return sum(max(0, one.attempts - 1) for one in self.calls)

    def reached(self) -> list[list[Called]]:
        """For each fault the calls that were sent again for it, or failed: the latest fault that they can be put down to."""
        found: list[list[Called]] = [[] for _ in self.faults]
        for one in self.calls:
            if one.attempts == 1 and not one.error:
                continue
            places = [i for i, fault in enumerate(self.faults) if fault.at < one.end and one.start < fault.until + _AFTER]
            if places:
                found[max(places, key=lambda i: self.faults[i].at)].append(one)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One row for each kind of fault; times in seconds."""
        reached, rows = self.reached(), []
        for kind in dict.fromkeys(fault.kind for fault in self.faults):
            own = [i for i, fault in enumerate(self.faults) if fault.kind == kind]
            waits = [one.end - max(one.start, self.faults[i].at) for i in own for one in reached[i]]
            outs = [x for i in own if (x := self.faults[i].out_after) is not None]
            backs = [x for i in own if (x := self.faults[i].recovered_after) is not None]
            rows.append(
                {
                    "fault": kind,
                    "times": len(own),
                    "calls_reached": len(waits),
                    "without_service_p50": quantile(waits, 0.5),
                    "without_service_p99": quantile(waits, 0.99),
                    "without_service_most": max(waits, default=0.0),
                    "out_p50": quantile(outs, 0.5),
                    "out_most": max(outs, default=0.0),
                    "recovered_p50": quantile(backs, 0.5),
                    "recovered_most": max(backs, default=0.0),
                    "not_recovered": sum(
                        self.faults[i].recovered_after is None and not self.faults[i].note.startswith("stays") for i in own
                    ),
                }
            )
        return rows

    def whole(self) -> dict[str, Any]:
        """Everything as JSON can write it."""
        took = [one.end - one.start for one in self.calls]
        once = [one.end - one.start for one in self.calls if one.attempts == 1]
        by_fault = {id(one) for each in self.reached() for one in each}
        again = [one for one in self.calls if one.attempts > 1]
        return {
            "calls": len(self.calls),
            "callers": len({one.caller for one in self.calls}),
            "failures": len(self.failures),
            "errors": sorted(set(self.failures))[:20],
            "sent_again": self.retries,
            "calls_sent_again": len(again),
            "calls_sent_again_without_a_fault": sum(id(one) not in by_fault for one in again),
            "p50": quantile(took, 0.5),
            "p99": quantile(took, 0.99),
            "most": max(took, default=0.0),
            "p50_sent_once": quantile(once, 0.5),
            "p99_sent_once": quantile(once, 0.99),
            "replicas_that_answered": len({one.where for one in self.calls if one.where}),
            "rows": self.rows(),
            "reached": [
                {"fault": fault.kind, "after": one.start - fault.at, "took": one.end - one.start, "attempts": one.attempts}
                for fault, reached in zip(self.faults, self.reached(), strict=True)
                for one in reached
            ],
            "faults": [asdict(fault) for fault in self.faults],
            "left": list(self.left),
        }
