"""Records -> tables with intervals, as Markdown; and the JSON form of a run, from which the tables can be made again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from quality_rooms.intervals import Interval, interval
from quality_rooms.judging import FULL, MEASURES, Record
from quality_rooms.methods import BASES
from quality_rooms.tasks import GROUPS, TASKS

__all__ = ["Run", "tables"]

SEED = 0  # of the bootstrap; the run's own seed makes the prompts
FEWEST = 20  # prompts a task: a bootstrap of fewer is too narrow


class Run:
    """One model's records, looked up by task, budget and method. `about`: machine, seed, sizes."""

    def __init__(self, about: Mapping[str, Any], records: Sequence[Record]) -> None:
        self.about = dict(about)
        self._values: dict[tuple[str, int, str], dict[int, Record]] = {}
        for record in records:
            self._values.setdefault((record.task, record.budget, record.method), {})[record.prompt] = record

    @classmethod
    def pooled(cls, runs: Sequence["Run"]) -> "Run":
        """One run of the prompts of several that asked the same of other prompts."""
        about = dict(runs[0].about)
        for name in ("seed", "prompts a task", "seconds"):
            about[name] = " + ".join(str(run.about.get(name)) for run in runs)
        records: list[Record] = []
        for run in runs:
            first = 1 + max((record.prompt for record in records), default=-1)
            every = [record for found in run._values.values() for record in found.values()]
            records += [replace(record, prompt=first + record.prompt) for record in every]
        return cls(about, records)

    @property
    def prompts(self) -> int:
        """The fewest of any task."""
        return min((len(found) for found in self._values.values()), default=0)

    @property
    def budgets(self) -> list[int]:
        """Ascending."""
        return sorted({budget for _, budget, _ in self._values if budget})

    @property
    def methods(self) -> list[str]:
        """In the order they were run, the full cache first."""
        return list(dict.fromkeys(method for _, _, method in self._values))

    def tasks(self, group: str) -> list[str]:
        """The tasks of a group that were run."""
        run = {task for task, _, _ in self._values}
        return [name for name, task in TASKS.items() if task.group == group and name in run]

    def values(self, task: str, method: str, budgets: Sequence[int], measure: str) -> np.ndarray:
        """One number a prompt: its mean over the budgets."""
        of = [0] if method == FULL else budgets
        found = [self._values[task, budget, method] for budget in of]
        return np.array([np.mean([part[prompt].__getattribute__(measure) for part in found]) for prompt in sorted(found[0])])

    def mean(self, group: str, method: str, budgets: Sequence[int], measure: str) -> float:
        """Over the tasks of a group."""
        return float(np.mean([self.values(task, method, budgets, measure).mean() for task in self.tasks(group)]))

    def difference(self, tasks: Sequence[str], method: str, base: str, budgets: Sequence[int], measure: str) -> Interval:
        """method - base on the same prompts."""
        pairs = [(self.values(task, method, budgets, measure), self.values(task, base, budgets, measure)) for task in tasks]
        return interval([mine - theirs for mine, theirs in pairs], seed=SEED)

    def to_json(self) -> dict[str, Any]:
        """about, and by task, budget and method the list of each measure, one number a prompt."""
        rows = []
        for (task, budget, method), found in self._values.items():
            ordered = [found[prompt] for prompt in sorted(found)]
            lists = {name: [round(getattr(record, name), 5) for record in ordered] for name in MEASURES}
            rows.append({"task": task, "budget": budget, "method": method, "prompts": sorted(found), **lists})
        return {"about": self.about, "rows": rows}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "Run":
        """The run of `to_json`."""
        records = [
            Record(row["task"], prompt, row["budget"], row["method"], *measured)
            for row in given["rows"]
            for prompt, *measured in zip(row["prompts"], *(row[name] for name in MEASURES), strict=True)
        ]
        return cls(given["about"], records)


def measure_of(group: str) -> tuple[str, float]:
    """What a group's table shows, and its factor: points of exact match, or nats a token."""
    return ("nll", 1.0) if group == "documents" else ("match", 100.0)


def shown(found: Interval, factor: float, *, trusted: bool = True) -> str:
    """The mean, the bounds, and a star where they exclude 0 and can be trusted."""
    digits = 1 if factor == 100.0 else 3
    mean, low, high = (f"{value * factor:+.{digits}f}" for value in found)
    return f"{mean} [{low}, {high}]{'*' if found.excludes_zero and trusted else ''}"


def tables(run: Run) -> Iterator[str]:
    """Markdown lines: levels, differences to the base over all budgets, then a budget at a time, then a task at a time."""
    groups = [group for group in GROUPS if run.tasks(group)]
    yield f"### {run.about.get('model')}: " + ", ".join(
        f"{name} {value}" for name, value in run.about.items() if name != "model"
    )
    yield ""
    yield "Exact match in points (more is better); documents: nats a token (less is better)."
    yield ""
    if run.prompts < FEWEST:
        yield f"Fewer than {FEWEST} prompts a task: too few for the intervals to be trusted, so nothing is starred."
        yield ""
    yield from _levels(run, groups)
    for base in [base for base in BASES if base in run.methods]:
        yield f"**Difference to {base}, all budgets together** (95% intervals, `*` excludes 0)"
        yield ""
        yield from _differences(run, base, {group: run.tasks(group) for group in groups}, run.budgets)
        for measure, text in (("nll", "the right text's loss"), ("kl", "the divergence from the full cache's prediction")):
            yield f"The same for {text}, nats a token (less is better)"
            yield ""
            yield from _differences(run, base, {group: run.tasks(group) for group in groups}, run.budgets, measure)
        for budget in run.budgets:
            yield f"Difference to {base} at budget {budget}"
            yield ""
            yield from _differences(run, base, {group: run.tasks(group) for group in groups}, [budget])
        yield f"Difference to {base} by task, all budgets together"
        yield ""
        yield from _differences(run, base, {task: [task] for group in groups for task in run.tasks(group)}, run.budgets)


def _levels(run: Run, groups: Sequence[str]) -> Iterator[str]:
    yield "| method | " + " | ".join(f"{group}, B {' / '.join(map(str, run.budgets))}" for group in groups) + " |"
    yield "|---|" + "---|" * len(groups)
    for method in run.methods:
        cells = []
        for group in groups:
            measure, factor = measure_of(group)
            budgets = [0] if method == FULL else run.budgets
            digits = 1 if factor == 100.0 else 3
            cells.append(" / ".join(f"{run.mean(group, method, [budget], measure) * factor:.{digits}f}" for budget in budgets))
        yield f"| {method} | " + " | ".join(cells) + " |"
    yield ""


def _differences(
    run: Run, base: str, columns: Mapping[str, Sequence[str]], budgets: Sequence[int], always: str | None = None
) -> Iterator[str]:
    """`always`: the measure of every column, in place of each group's own."""
    yield f"| on {base} | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for method in run.methods:
        name = method.removeprefix(f"{base} + ")
        if name == method:
            continue
        cells = []
        for tasks in columns.values():
            measure, factor = (always, 1.0) if always else measure_of(TASKS[tasks[0]].group)
            found = run.difference(tasks, method, base, budgets, measure)
            cells.append(shown(found, factor, trusted=run.prompts >= FEWEST))
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""
