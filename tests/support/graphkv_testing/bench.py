"""An engine without a server: its batches are recorded, held until released, and broken on request."""

import asyncio
import dataclasses
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch
from graphkv_server.admission import Admission, Lease
from graphkv_server.buffers import Buffer, BufferPool
from graphkv_server.engine import Engine, Job
from graphkv_server.metrics import Metrics

from graphkv.algorithm import select_layers
from graphkv.layer import Layer
from graphkv.terms.selection import LayerSelection

__all__ = ["Bench", "answers", "hold"]


class Poisoning(BufferPool):
    """What comes back is overwritten: whoever still reads it would show."""

    def give_back(self, buffer: Buffer) -> None:
        buffer.memory[:] = 255
        super().give_back(buffer)


class Bench:
    """An engine whose batches are recorded, held until released, and broken on request."""

    def __init__(self, *, max_batch_bytes: int = 2**20, broken: Callable[[Sequence[Any]], None] | None = None) -> None:
        self.batches: list[int] = []
        self.release = threading.Event()
        self.release.set()
        self.started = threading.Event()
        self._broken = broken
        self.metrics = Metrics()
        self.admission = Admission(Poisoning(2**20), self.metrics, max_bytes=2**20, max_requests=99, queue_timeout=1)
        self.engine = Engine(torch.device("cpu"), self.metrics, max_batch_bytes=max_batch_bytes, select=self._select)

    def _select(self, work: Sequence[Any]) -> Any:
        self.batches.append(len(work))
        self.started.set()
        self.release.wait(30)
        if self._broken is not None:
            self._broken(work)
        return select_layers(work)

    async def submit(self, job: Job, work: Layer, *, prompt: int = 0, size: int = 1000, layers: int = 1) -> None:
        """Hands the job a layer in memory of its lease, as the assembler does."""
        with self.admission.admit() as call:
            (lease,) = await call.lease(size)
            lease.finished()
        job.submit(_within(lease, work), lease, prompt=prompt, size=size, layers=layers)

    def run(self, body: Callable[[], Awaitable[None]]) -> None:
        """Runs the body with the engine started; afterwards all has come back."""

        async def whole() -> None:
            self.engine.start()
            try:
                await body()
            finally:
                self.release.set()
                await self.engine.close()
            assert self.admission.bytes_in_flight == 0
            assert self.metrics.registry.get_sample_value("graphkv_queued_rows") == 0

        asyncio.run(whole())


async def answers(job: Job) -> list[LayerSelection]:
    """All of a job's answers, in the order in which they come."""
    return [answer async for answer in job.results()]


async def hold(bench: Bench, job: Job, work: Layer, **options: int) -> None:
    """Keeps the thread busy with one layer, so that what follows waits together."""
    bench.release.clear()
    bench.started.clear()
    await bench.submit(job, work, **options)
    await asyncio.to_thread(bench.started.wait, 30)


def _within(lease: Lease, work: Layer) -> Layer:
    """The same layer, its tensors in the lease's buffer."""
    given = {entry.name: getattr(work, entry.name) for entry in dataclasses.fields(work)}
    tensors = {name: own for name, own in given.items() if isinstance(own, torch.Tensor)}
    memory, start, moved = lease.buffer(sum(own.nbytes for own in tensors.values())).memory, 0, {}
    for name, own in tensors.items():
        place = torch.frombuffer(memory.data, dtype=own.dtype, count=own.numel(), offset=start).view(own.shape)
        moved[name] = place.copy_(own)
        start += own.nbytes
    return dataclasses.replace(work, **moved)  # type: ignore[arg-type]  # the fields are the layer's own, by name
