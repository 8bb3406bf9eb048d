"""Paired bootstrap: a difference between two methods on the same prompts, with its 95% interval. Knows numbers alone."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["DRAWS", "Interval", "interval"]

DRAWS = 4000


class Interval(NamedTuple):
    """A mean and the bounds of its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0.0 or self.high < 0.0


def interval(tasks: Sequence[np.ndarray], *, seed: int, draws: int = DRAWS) -> Interval:
    """The mean over tasks of each task's mean over its prompts; prompts are drawn again within their own task.

    tasks: one array a task of one number a prompt (for a paired difference: the difference on that prompt).
    """
    if not tasks or any(len(values) == 0 for values in tasks):
        raise ValueError("every task needs at least one prompt")
    chance = np.random.default_rng(seed)
    drawn = np.zeros(draws)
    for values in tasks:
        places = chance.integers(0, len(values), size=(draws, len(values)))
        drawn += np.asarray(values, dtype=np.float64)[places].mean(axis=1)
    drawn /= len(tasks)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(np.mean([np.mean(values) for values in tasks])), float(low), float(high))
