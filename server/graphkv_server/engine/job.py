"""Job: one call's layers in the engine. Lives in the event loop; the engine's thread only ever reads `closed`."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from graphkv.algorithm import Part
from graphkv.terms.errors import GraphKVError
from graphkv.terms.selection import LayerSelection
from graphkv_server.admission import Lease
from graphkv_server.engine.batcher import Allocation, Joining, Task, Unit
from graphkv_server.engine.work import Work
from graphkv_server.rooms import part_bytes

if TYPE_CHECKING:
    from graphkv_server.engine.engine import Engine

__all__ = ["Job", "Outcome"]

Outcome = LayerSelection | Part | list[Task] | GraphKVError
"""Of a layer: its answer, or its part of one; of all layers of a prompt: their answer, or the layers with their budgets."""


class Job:
    """One call. Leaving the block closes it: what waits for the engine is dropped and its memory goes back at once.

    Layers that cannot be answered before all of their prompt are there wait here: whole ones until their budgets can be
    found, computed ones as parts of the answer they share.
    `deadline` by the engine's clock (None = none). `seconds`: time by phase, summed over its layers.
    """

    def __init__(self, engine: "Engine", deadline: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._answers: asyncio.Queue[tuple[LayerSelection, list[Lease]] | None] = asyncio.Queue()  # None: is it over?
        self._whole: dict[int, list[Task]] = {}  # by prompt, as are the next
        self._parts: dict[int, list[tuple[Part, Lease]]] = {}
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
        self._drop_held()

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and self._clock() >= self.deadline

    def submit(self, work: Work, lease: Lease, *, prompt: int, size: int, layers: int = 1) -> None:
        """Hands over a whole layer with the lease of its memory; the engine gives the lease back, whatever happens.

        layers: how many of the prompt must be there before it can be answered; they all come here.
        """
        if self._over:
            lease.give_back()
            return
        task = Task(self, work, lease, prompt, size, layers)
        if work.plan.allocated:
            self._add(task)
            return
        held = self._whole.setdefault(prompt, [])
        held.append(task)
        if len(held) == layers:
            del self._whole[prompt]
            self._add(Allocation(self, sorted(held, key=lambda task: task.work.plan.layer), prompt))

    def finish(self) -> None:
        """No more layers will come: `results` ends after the last answer."""
        self._complete = True
        self._end_if_answered()

    def fail(self, error: GraphKVError) -> None:
        """Ends `results` with an error, now: answers that were not taken yet are not given. The first error counts."""
        if self._failure is None:
            self._failure = error
            self._drop_held()
            self._answers.put_nowait(None)

    def answered(self, unit: Unit, outcome: Outcome, seconds: dict[str, float]) -> None:
        """The engine's word about a layer, or about all layers of a prompt."""
        self._pending -= 1
        for phase, spent in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        if self._over or isinstance(outcome, GraphKVError):
            _give_back(unit.leases)
        if self._over:
            return
        if isinstance(outcome, GraphKVError):
            self.fail(outcome)
        elif isinstance(outcome, LayerSelection):
            self._answer(outcome, unit.leases)
        elif isinstance(outcome, Part) and isinstance(unit, Task):
            self._hold(outcome, unit)
        elif isinstance(outcome, list):
            for task in outcome:
                self._add(task)

    async def results(self) -> AsyncIterator[LayerSelection]:
        """Layers as they are chosen, in any order; raises the error that ends the call."""
        while True:
            answer = await self._answers.get()
            if self._failure is not None:
                raise self._failure
            if answer is None:
                return
            selection, leases = answer
            try:
                yield selection
            finally:
                _give_back(leases)

    @property
    def _over(self) -> bool:
        return self.closed or self._failure is not None

    def _add(self, unit: Unit) -> None:
        self._pending += 1
        self._engine.add(unit)

    def _answer(self, selection: LayerSelection, leases: list[Lease]) -> None:
        """From here on only the answer takes room, until it is sent: input goes on even where a caller reads late."""
        left = sum(row.nbytes for row in selection.rows) + sum(array.nbytes for array in selection.outputs.values())
        for lease in leases:
            lease.shrink(min(lease.size, left))
            left -= lease.size
        self._answers.put_nowait((selection, leases))
        self._end_if_answered()

    def _hold(self, part: Part, task: Task) -> None:
        """Keeps a part, and of its layer's room only what that takes; the last of its prompt joins them."""
        task.lease.shrink(min(task.lease.size, part_bytes(part.plan, part.nbytes, layers=task.layers)))
        held = self._parts.setdefault(task.prompt, [])
        held.append((part, task.lease))
        if len(held) == task.layers:
            del self._parts[task.prompt]
            held.sort(key=lambda own: own[0].plan.layer)
            self._add(Joining(self, [part for part, _ in held], [lease for _, lease in held], task.prompt))

    def _drop_held(self) -> None:
        """Lets go of the answers that were not taken, and of the layers that wait for others."""
        while not self._answers.empty():
            answer = self._answers.get_nowait()
            if answer is not None:
                _give_back(answer[1])
        for tasks in self._whole.values():
            _give_back([task.lease for task in tasks])
        for parts in self._parts.values():
            _give_back([lease for _, lease in parts])
        self._whole.clear()
        self._parts.clear()

    def _end_if_answered(self) -> None:
        if self._complete and self._pending == 0:
            self._answers.put_nowait(None)


def _give_back(leases: Sequence[Lease]) -> None:
    for lease in leases:
        lease.give_back()
