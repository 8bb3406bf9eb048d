"""Engine: one thread that computes waiting layers in batches on one device and hands each answer to its job.

The event loop adds and drops tasks; the thread takes a batch, computes it, and reports back through the loop. Whatever
goes wrong in a batch is the failure of the layer that caused it, never of its neighbours. Knows no gRPC.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphkv.algorithm import Chosen, select_layers
from graphkv.terms.errors import DeadlineError, GraphKVError, InternalError, InvalidInputError, OverloadedError, Reason
from graphkv.terms.selection import LayerSelection
from graphkv_server import logs
from graphkv_server.engine.batcher import Task, split, take_batch
from graphkv_server.engine.job import Job
from graphkv_server.engine.transfers import Transfers
from graphkv_server.metrics import Metrics

__all__ = ["Engine"]

Select = Callable[[Sequence[Any]], list[Chosen | InvalidInputError]]
Outcome = LayerSelection | GraphKVError

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
        self._waiting: list[Task] = []
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

    def add(self, task: Task) -> None:
        """Queues a layer."""
        task.queued_at = self._clock()
        with self._wake:
            self._waiting.append(task)
            self._metrics.queued_rows.inc(task.rows)
            self._wake.notify()

    def drop(self, job: Job) -> None:
        """Takes a job's waiting layers out and gives their leases back; one being computed ends by itself."""
        with self._wake:
            dropped = [task for task in self._waiting if task.owner is job]
            self._waiting = [task for task in self._waiting if task.owner is not job]
        for task in dropped:
            self._metrics.queued_rows.dec(task.rows)
            task.lease.give_back()

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

    def _run(self, batch: list[Task]) -> None:
        started = self._clock()
        self._metrics.queued_rows.dec(sum(task.rows for task in batch))
        ready: list[Task] = []
        for task in batch:
            if task.owner.closed:
                self._report(task, DeadlineError("the caller has left"), {})
            elif task.owner.expired:
                self._metrics.expired_before_start_total.inc()
                error = DeadlineError("the deadline passed before the layer was computed", reason=Reason.EXPIRED)
                self._report(task, error, {})
            else:
                ready.append(task)
        if not ready:
            return
        self._metrics.batch_rows.observe(sum(task.rows for task in ready))
        outcomes = self._outcomes(ready)
        ended = self._clock()
        for task, outcome in zip(ready, outcomes, strict=True):
            seconds = {"queue": started - task.queued_at, "compute": ended - started}
            for phase, spent in seconds.items():
                self._metrics.phase_duration_seconds.labels(phase=phase).observe(spent)
            self._report(task, outcome, seconds)

    def _report(self, task: Task, outcome: Outcome, seconds: dict[str, float]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(task.owner.answered, task, outcome, seconds)

    def _outcomes(self, batch: list[Task]) -> list[Outcome]:
        """One outcome a task. A batch that does not fit is halved; one that breaks is computed layer by layer."""
        try:
            chosen = self._select(self._transfers.to_device([task.work for task in batch]))
            return [self._outcome(task, answer) for task, answer in zip(batch, chosen, strict=True)]
        except Exception as error:  # noqa: BLE001  # whatever the algorithm raises ends one request, not the thread
            error.__traceback__ = None  # its frames hold the tensors of the launch that failed
            if len(batch) == 1:
                return [self._failure(error)]
            parts = list(split(batch)) if _out_of_memory(error) else [[task] for task in batch]
        # Not in the block above: as long as it lasts, the error lives.
        self._transfers.release()
        return [outcome for part in parts for outcome in self._outcomes(part)]

    def _outcome(self, task: Task, answer: Chosen | InvalidInputError) -> Outcome:
        plan = task.work.plan
        if isinstance(answer, InvalidInputError):
            message = answer.message if task.prompt == 0 else f"prompt {task.prompt}: {answer.message}"
            return InvalidInputError(message, reason=answer.reason, argument=answer.argument)
        indices = answer.indices
        return LayerSelection(
            layer=plan.layer,
            indices=[row.cpu().numpy() for row in indices] if isinstance(indices, list) else indices.cpu().numpy(),
            num_tokens=plan.num_tokens,
            kept_score_ratio=answer.kept_score_ratio,
            changed=answer.changed,
            importance="scores" if plan.caller_scores else plan.policy.scorer,
            fingerprint=plan.policy.fingerprint,
            prompt=task.prompt,
        )

    def _failure(self, error: Exception) -> GraphKVError:
        if _out_of_memory(error):
            self._transfers.release()
            message = f"this layer alone needs more memory than {self.device} has free now"
            return OverloadedError(message, reason=Reason.OUT_OF_MEMORY, retry_after=_RETRY_AFTER)
        if isinstance(error, GraphKVError):
            return error
        logs.event("engine_failed", level="error", kind=type(error).__name__, text=str(error))
        return InternalError(f"the computation failed ({type(error).__name__}); please report the request id")


def _out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; torch on the CPU says it in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
