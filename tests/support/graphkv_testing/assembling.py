"""The assembler driven without a socket or an event loop: calls whose every byte and lease is accounted for."""

from collections.abc import Coroutine
from typing import Any

import pytest
from graphkv_proto import messages
from graphkv_proto import v1 as pb
from graphkv_server.admission import Admission
from graphkv_server.assembler import Assembler
from graphkv_server.buffers import Buffer, BufferPool
from graphkv_server.engine.work import Work
from graphkv_server.metrics import Metrics

from graphkv.terms.errors import GraphKVError

__all__ = ["BOUND", "AssemblerCall", "finish"]

BOUND = 2**20


class Poisoned(BufferPool):
    """Every loan starts as NaN (in every float format) and -1."""

    def take(self, size: int) -> Buffer:
        buffer = super().take(size)
        buffer.memory[:] = 255
        return buffer


class Recorder:
    """The engine's place: keeps the layers and their leases."""

    def __init__(self) -> None:
        self.layers: dict[tuple[int, int], Work] = {}
        self.together: set[int] = set()  # how many layers are answered together, as was said
        self.leases: list[Any] = []
        self.finished = False

    def submit(self, work: Work, lease: Any, *, prompt: int, size: int, layers: int) -> None:
        assert (prompt, work.plan.layer) not in self.layers
        self.layers[prompt, work.plan.layer] = work
        self.together.add(layers)
        self.leases.append(lease)

    def finish(self) -> None:
        assert not self.finished
        self.finished = True


class AssemblerCall:
    """One call of the assembler with all it needs; `close` gives everything back and checks the books."""

    def __init__(self, header: pb.Header) -> None:
        self.admission = Admission(Poisoned(BOUND), Metrics(), max_bytes=BOUND, max_requests=2, queue_timeout=1)
        self.sink = Recorder()
        self._reservation = self.admission.admit()
        try:
            self.assembler = Assembler(messages.read_header(header), self._reservation, self.sink)
        except GraphKVError:
            assert self.admission.bytes_in_flight == 0  # refused before a byte was reserved
            raise

    def take(self, message: pb.SelectRequest) -> None:
        """Sends one message; with room to spare nothing ever waits, so no event loop is needed."""
        finish(self.assembler.take(message))

    def close(self) -> None:
        self._reservation.__exit__(None, None, None)
        for lease in self.sink.leases:
            lease.give_back()
        assert self.admission.bytes_in_flight == 0
        assert self.admission.pool.lent_bytes == 0


def finish(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs what never waits."""
    with pytest.raises(StopIteration):
        coroutine.send(None)
