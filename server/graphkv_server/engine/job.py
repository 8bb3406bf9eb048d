"""Job: one call's layers in the engine. Lives in the event loop; the engine's thread only ever reads `closed`."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from graphkv.candidates import Candidates
from graphkv.layer import Layer
from graphkv.terms.errors import GraphKVError
from graphkv.terms.selection import LayerSelection
from graphkv_server.admission import Lease
from graphkv_server.engine.batcher import Task

if TYPE_CHECKING:
    from graphkv_server.engine.engine import Engine

__all__ = ["Job"]


class Job:
    """One call. Leaving the block closes it: what waits for the engine is dropped and its memory goes back at once.

    `deadline` by the engine's clock (None = none). `seconds`: time by phase, summed over its layers.
    """

    def __init__(self, engine: "Engine", deadline: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._answers: asyncio.Queue[tuple[LayerSelection, Lease] | None] = asyncio.Queue()  # None: look whether it is over
        self._failure: GraphKVError | None = None
        self._pending = 0
        self._complete = False
        self.deadline = deadline
        self.closed = False
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closed = True
        self._engine.drop(self)
        self._drop_answers()

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and self._clock() >= self.deadline

    def submit(self, work: Layer | Candidates, lease: Lease, *, prompt: int, size: int) -> None:
        """Hands over a whole layer with the lease of its memory; the engine gives the lease back, whatever happens."""
        if self._over:
            lease.give_back()
            return
        self._pending += 1
        self._engine.add(Task(self, work, lease, prompt, size))

    def finish(self) -> None:
        """No more layers will come: `results` ends after the last answer."""
        self._complete = True
        self._end_if_answered()

    def fail(self, error: GraphKVError) -> None:
        """Ends `results` with an error, now: answers that were not taken yet are not given. The first error counts."""
        if self._failure is None:
            self._failure = error
            self._drop_answers()
            self._answers.put_nowait(None)

    def answered(self, task: Task, outcome: LayerSelection | GraphKVError, seconds: dict[str, float]) -> None:
        """The engine's word about one layer."""
        self._pending -= 1
        for phase, spent in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        if self._over or isinstance(outcome, GraphKVError):
            task.lease.give_back()
        if self._over:
            return
        if isinstance(outcome, GraphKVError):
            self.fail(outcome)
            return
        # From here on only the answer takes room, until it is sent: input goes on even where a caller reads late.
        task.lease.shrink(min(task.lease.size, sum(row.nbytes for row in outcome.indices)))
        self._answers.put_nowait((outcome, task.lease))
        self._end_if_answered()

    async def results(self) -> AsyncIterator[LayerSelection]:
        """Layers as they are chosen, in any order; raises the error that ends the call."""
        while True:
            answer = await self._answers.get()
            if self._failure is not None:
                raise self._failure
            if answer is None:
                return
            selection, lease = answer
            try:
                yield selection
            finally:
                lease.give_back()

    @property
    def _over(self) -> bool:
        return self.closed or self._failure is not None

    def _drop_answers(self) -> None:
        while not self._answers.empty():
            answer = self._answers.get_nowait()
            if answer is not None:
                answer[1].give_back()

    def _end_if_answered(self) -> None:
        if self._complete and self._pending == 0:
            self._answers.put_nowait(None)
