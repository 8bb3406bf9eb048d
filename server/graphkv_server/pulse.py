"""Pulse: whether the engine really works. A tiny selection runs through it whenever it has been idle, as a caller's would.

A busy engine is not tested: the batches it ends are its pulse. One that ends none for `PAUSE_AFTER` while something waits
does not beat: callers should go elsewhere until it does. One that is so for `DEAD_AFTER`, or that cannot compute even the
tiny selection, should be replaced.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import torch

from graphkv.budgets import plan_layers
from graphkv.layer import Layer
from graphkv.terms.errors import GraphKVError, InternalError
from graphkv.terms.policy import Policy
from graphkv_server import logs
from graphkv_server.admission import Admission, Lease, Reservation
from graphkv_server.engine import Engine

__all__ = ["Pulse", "StuckError"]

PERIOD = 0.5
PAUSE_AFTER = 3.0
DEAD_AFTER = 30.0
"""Seconds; a single batch on a slow CPU may take long, and a replica that is replaced loses its calls."""
_FAILURES = 3
"""Failed tiny selections in a row after which the engine is dead: a GPU that is lost fails every one."""


class StuckError(Exception):
    """The engine does not work any more; the message says since when."""


class Pulse:
    """Watches one engine. `paused` is told when it stops beating (True) and beats again (False)."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        paused: Callable[[bool], Awaitable[None]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._paused = paused
        self._clock = clock
        self._batches = -1
        self._beat_at = clock()
        self._failures = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.beating = True

    def start(self) -> None:
        """Begins, in the running event loop."""
        self._beat_at = self._clock()
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._test())]

    async def stop(self) -> None:
        """Ends; a tiny selection that still waits is dropped."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def check(self) -> None:
        """Raises StuckError where the engine should be replaced."""
        silent = self._clock() - self._beat_at
        if not self.beating and silent > DEAD_AFTER:
            raise StuckError(f"the engine has ended no batch for {silent:.0f} s")
        if self._failures >= _FAILURES:
            raise StuckError(f"the engine failed {self._failures} tiny selections in a row")

    async def _watch(self) -> None:
        while True:
            now = self._clock()
            if self._engine.batches != self._batches:
                self._batches, self._beat_at = self._engine.batches, now
            beating = now - self._beat_at <= PAUSE_AFTER and self._failures < _FAILURES
            if beating != self.beating:
                self.beating = beating
                event = "engine_beats" if beating else "engine_silent"
                logs.event(event, level="warning", seconds=round(now - self._beat_at, 3))
                await self._paused(not beating)
            await asyncio.sleep(PERIOD)

    async def _test(self) -> None:
        while True:
            batches = self._engine.batches
            await asyncio.sleep(PERIOD)
            if self._engine.batches == batches:
                await self._select()

    async def _select(self) -> None:
        """A tiny selection, as a caller's would be; whatever it ends with but our own mistake is a sign of life."""
        lease = Lease(self._admission, Reservation(self._admission, None), 0)
        with self._engine.open() as job, contextlib.suppress(GraphKVError):
            job.submit(_tiny(), lease, prompt=0, size=1)
            job.finish()
            try:
                async for _ in job.results():
                    pass
            except InternalError as error:
                self._failures += 1
                logs.event("engine_test_failed", level="error", text=str(error))
            else:
                self._failures = 0


def _tiny() -> Layer:
    """Two tokens of one head, of which one is kept; on the CPU, as what callers send."""
    policy = Policy(scorer="knorm", budget=1, window=0, sinks=0, graph=None)
    (plan,) = plan_layers(policy, num_tokens=2, num_layers=1)
    return Layer(plan=plan, keys=torch.ones((1, 2, 1)))
