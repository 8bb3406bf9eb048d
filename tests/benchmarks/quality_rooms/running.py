"""All cases of one model, in one process or several; each process has the model once."""

import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from graphkv import Rope
from quality_rooms.judging import Record, judge
from quality_rooms.methods import methods
from quality_rooms.models import Loaded, load
from quality_rooms.prefill import Prefiller
from quality_rooms.tasks import Case

__all__ = ["Settings", "run"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a process needs to judge a case. device: the model's; choosing: where tokens are chosen."""

    model: str
    device: str
    choosing: str
    bases: tuple[str, ...]
    also: tuple[str, ...]
    budgets: tuple[int, ...]
    seed: int


def run(settings: Settings, loaded: Loaded, cases: Sequence[Case], processes: int, minutes: float | None) -> list[Record]:
    """Judges the cases, the first prompt of every task first; progress on a terminal or, a line a minute, elsewhere.

    Where `minutes` run out, the prompts that were judged in every task by then are the answer.
    """
    cases = sorted(cases, key=lambda case: case.prompt)
    tasks = len({case.task for case in cases})
    started = shown = time.perf_counter()
    records: list[Record] = []
    for done, found in enumerate(_judged(settings, loaded, cases, processes), 1):
        records += found
        now = time.perf_counter()
        if sys.stderr.isatty() or now - shown > 60:
            shown = now
            left = (now - started) / done * (len(cases) - done)
            print(f"\r{settings.model}: {done} of {len(cases)} prompts, {left:.0f} s left", end="", file=sys.stderr, flush=True)
        if minutes is not None and now - started > 60 * minutes and done >= tasks:
            whole = done // tasks
            records = [record for record in records if record.prompt < whole]
            print(f"\ntime is up: {whole} prompts a task", file=sys.stderr)
            break
    print(f"\r{settings.model}: {done} prompts in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return records


def _judged(settings: Settings, loaded: Loaded, cases: Sequence[Case], processes: int) -> Iterator[list[Record]]:
    if processes == 1:
        yield from map(_Judge(settings, loaded), cases)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes share the cores
    with multiprocessing.get_context("spawn").Pool(processes, _prepare, (settings,)) as pool:
        yield from pool.imap(_work, cases)


class _Judge:
    def __init__(self, settings: Settings, loaded: Loaded) -> None:
        self._settings = settings
        self._prefiller = Prefiller(loaded.model)
        self._rope = Rope.from_config(loaded.model.config)
        self._methods = methods(settings.bases, settings.also)

    def __call__(self, case: Case) -> list[Record]:
        given = self._settings
        return judge(
            self._prefiller,
            case,
            rope=self._rope,
            methods=self._methods,
            budgets=given.budgets,
            device=given.choosing,
            seed=given.seed,
        )


@functools.cache
def _judge_of(settings: Settings) -> _Judge:
    return _Judge(settings, load(settings.model, settings.device))


_settings: list[Settings] = []


def _prepare(settings: Settings) -> None:
    """Of a process: remembers what it is for, and loads the model."""
    torch.set_num_threads(1)
    _settings.append(settings)
    _judge_of(settings)


def _work(case: Case) -> list[Record]:
    return _judge_of(_settings[0])(case)
