"""Engine: one thread that computes waiting layers in batches on one device and hands each answer to its job.

The event loop adds and drops tasks; the thread takes a batch, computes it, and reports back through the loop. Whatever
goes wrong in a batch is the failure of the layer that caused it, never of its neighbours. Where a policy needs all layers of
a prompt, finding their budgets, or joining their parts to the one answer, is a batch of its own. Knows no gRPC.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphkv.algorithm import Chosen, Part, allocate, finish, select_layers, selection_of
from graphkv.terms.errors import DeadlineError, GraphKVError, InternalError, InvalidInputError, OverloadedError, Reason
from graphkv_server import logs
from graphkv_server.engine.batcher import Allocation, Joining, Task, Unit, split, take_batch
from graphkv_server.engine.job import Job, Outcome
from graphkv_server.engine.transfers import Transfers
from graphkv_server.engine.work import ready
from graphkv_server.metrics import Metrics

__all__ = ["Engine"]

Select = Callable[[Sequence[Any]], list[Chosen | Part | InvalidInputError]]

_RETRY_AFTER = 1.0


class Engine:
    """Computes on `device`. `max_batch_bytes`: tensor bytes computed together; `select`: the algorithm, for tests.

    `batches`: how many have been computed, whatever came of them.
    """

    def __init__(
        self,
        device: torch.device,
        metrics: Metrics,
        *,
        max_batch_bytes: int,
        threads: int = 0,
        select: Select = select_layers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device = device
        self._metrics = metrics
        self._max_batch_bytes = max_batch_bytes
        self._threads = threads
        self._select = select
        self._clock = clock
        self._transfers = Transfers(device)
        self._waiting: list[Unit] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._computing = 0
        self.batches = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="graphkv-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; answers go to the event loop this is called in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Ends the thread after the batch it is computing; what still waits is dropped with its jobs."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        await asyncio.sleep(0)  # the answers of the last batch are in the loop's queue: let them be delivered

    @property
    def rows(self) -> int:
        """Rows that wait or are being computed."""
        with self._wake:
            return self._computing + sum(task.rows for task in self._waiting)

    def open(self, deadline: float | None = None) -> Job:
        """A job for one call; use it as a context manager."""
        return Job(self, deadline, self._clock)

    def add(self, unit: Unit) -> None:
        """Queues a layer, or a step over all layers of a prompt."""
        unit.queued_at = self._clock()
        with self._wake:
            self._waiting.append(unit)
            self._metrics.queued_rows.inc(unit.rows)
            self._wake.notify()

    def drop(self, job: Job) -> None:
        """Takes what waits of a job out and gives its leases back; what is being computed ends by itself."""
        with self._wake:
            dropped = [unit for unit in self._waiting if unit.owner is job]
            self._waiting = [unit for unit in self._waiting if unit.owner is not job]
        for unit in dropped:
            self._metrics.queued_rows.dec(unit.rows)
            for lease in unit.leases:
                lease.give_back()

    def _work(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not self._waiting and not self._stopping:
                        self._wake.wait()
                    if self._stopping:
                        return
                    batch = take_batch(self._waiting, self._max_batch_bytes)
                    self._computing = sum(task.rows for task in batch)
                self._run(batch)
                self._computing = 0
                self.batches += 1

    def _run(self, batch: list[Unit]) -> None:
        started = self._clock()
        self._metrics.queued_rows.dec(sum(unit.rows for unit in batch))
        wanted: list[Unit] = []
        for unit in batch:
            if unit.owner.closed:
                self._report(unit, DeadlineError("the caller has left"), {})
            elif unit.owner.expired:
                if not isinstance(unit, Joining):  # whose layers were computed
                    self._metrics.expired_before_start_total.inc(len(unit.leases))
                error = DeadlineError("the deadline passed before the layer was computed", reason=Reason.EXPIRED)
                self._report(unit, error, {})
            else:
                wanted.append(unit)
        if not wanted:
            return
        tasks = [unit for unit in wanted if isinstance(unit, Task)]
        if tasks:
            self._metrics.batch_rows.observe(sum(task.rows for task in tasks))
        steps = [unit for unit in wanted if not isinstance(unit, Task)]
        outcomes = self._outcomes(tasks) if tasks else [self._together(step) for step in steps]
        ended = self._clock()
        for unit, outcome in zip(wanted, outcomes, strict=True):
            seconds = {"queue": started - unit.queued_at, "compute": ended - started}
            for phase, spent in seconds.items():
                self._metrics.phase_duration_seconds.labels(phase=phase).observe(spent)
            self._report(unit, outcome, seconds)

    def _report(self, unit: Unit, outcome: Outcome, seconds: dict[str, float]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(unit.owner.answered, unit, outcome, seconds)

    def _outcomes(self, batch: list[Task]) -> list[Outcome]:
        """One outcome a task. A batch that does not fit is halved; one that breaks is computed layer by layer."""
        try:
            return self._selected(batch)
        except Exception as error:  # noqa: BLE001  # whatever the algorithm raises ends one request, not the thread
            error.__traceback__ = None  # its frames hold the tensors of the launch that failed
            if len(batch) == 1:
                return [self._failure(error)]
            parts = list(split(batch)) if _out_of_memory(error) else [[task] for task in batch]
        # Not in the block above: as long as it lasts, the error lives.
        self._transfers.release()
        return [outcome for part in parts for outcome in self._outcomes(part)]

    def _selected(self, batch: list[Task]) -> list[Outcome]:
        works = ready(self._transfers.to_device([task.work for task in batch]))
        good = [work for work in works if not isinstance(work, InvalidInputError)]
        chosen = iter(self._select(good))
        answers = [work if isinstance(work, InvalidInputError) else next(chosen) for work in works]
        return [self._outcome(task, answer) for task, answer in zip(batch, answers, strict=True)]

    def _outcome(self, task: Task, answer: Chosen | Part | InvalidInputError) -> Outcome:
        if isinstance(answer, InvalidInputError):
            return _of_prompt(answer, task.prompt)
        if isinstance(answer, Part):
            return self._transfers.to_host(answer)
        return selection_of(answer, task.work.plan, task.prompt, _to_numpy)

    def _together(self, step: Allocation | Joining) -> Outcome:
        """The outcome of a step over all layers of a prompt."""
        try:
            if isinstance(step, Joining):
                return selection_of(finish(step.parts), step.parts[0].plan, step.prompt, _to_numpy)
            return step.allocated(allocate(self._transfers.to_device(step.layers)))
        except InvalidInputError as error:
            return _of_prompt(error, step.prompt)
        except Exception as error:  # noqa: BLE001  # likewise
            error.__traceback__ = None
            return self._failure(error)

    def _failure(self, error: Exception) -> GraphKVError:
        if _out_of_memory(error):
            self._transfers.release()
            message = f"what was to be computed at once needs more memory than {self.device} has free now"
            return OverloadedError(message, reason=Reason.OUT_OF_MEMORY, retry_after=_RETRY_AFTER)
        if isinstance(error, GraphKVError):
            return error
        logs.event("engine_failed", level="error", kind=type(error).__name__, text=str(error))
        return InternalError(f"the computation failed ({type(error).__name__}); please report the request id")


def _of_prompt(error: InvalidInputError, prompt: int) -> InvalidInputError:
    """The error, saying which prompt it is about where a call has several."""
    message = error.message if prompt == 0 else f"prompt {prompt}: {error.message}"
    return InvalidInputError(message, reason=error.reason, argument=error.argument)


def _to_numpy(tensor: torch.Tensor) -> Any:
    return tensor.cpu().numpy()


def _out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; torch on the CPU says it in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
