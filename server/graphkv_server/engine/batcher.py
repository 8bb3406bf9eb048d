"""Which layers are computed together: the oldest, and every other of the same shape, whoever sent it.

Rows (one KV head of one layer of one prompt) are independent, so a batch changes no answer. A step that needs all layers of
a prompt is a batch of its own. Knows no thread and no call.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphkv.algorithm import Part
from graphkv.layer import Layer
from graphkv_server.engine.work import Work

__all__ = ["Allocation", "Joining", "Task", "Unit", "shape_of", "split", "take_batch"]


@dataclass(eq=False, slots=True)
class Task:
    """One layer on its way through the engine.

    owner: the job it belongs to, opaque here. size: bytes of its tensors. layers: how many of its prompt must be there
    before it can be answered. queued_at: by the engine's clock.
    """

    owner: Any
    work: Work
    lease: Any
    prompt: int
    size: int
    layers: int = 1
    queued_at: float = 0.0

    @property
    def rows(self) -> int:
        """Rows in this layer: its KV heads."""
        return self.work.kv_heads

    @property
    def leases(self) -> list[Any]:
        """Its lease."""
        return [self.lease]


@dataclass(eq=False, slots=True)
class Allocation:
    """All layers of one prompt, in order, whose budgets depend on all of them."""

    owner: Any
    tasks: list[Task]
    prompt: int
    queued_at: float = 0.0

    @property
    def rows(self) -> int:
        """Rows in these layers."""
        return sum(task.rows for task in self.tasks)

    @property
    def layers(self) -> list[Layer]:
        """The layers themselves; they come whole."""
        return [task.work for task in self.tasks if isinstance(task.work, Layer)]

    def allocated(self, layers: Sequence[Layer]) -> list[Task]:
        """The layers as tasks of their own, with the budgets of `layers`; their tensors stay where they are."""
        plans = [layer.plan for layer in layers]
        return [
            replace(task, work=replace(own, plan=plan)) for task, own, plan in zip(self.tasks, self.layers, plans, strict=True)
        ]

    @property
    def leases(self) -> list[Any]:
        """Of these layers."""
        return [task.lease for task in self.tasks]


@dataclass(eq=False, slots=True)
class Joining:
    """What all layers of one prompt, in order, bring to the one answer they share, and the leases that are left of them."""

    owner: Any
    parts: list[Part]
    leases: list[Any]
    prompt: int
    queued_at: float = 0.0

    @property
    def rows(self) -> int:
        """No row waits any more."""
        return 0


Unit = Task | Allocation | Joining


def shape_of(work: Work) -> Hashable:
    """Equal for layers that can share a launch: the form, KV heads, the sizes and dtypes of what is compared."""
    tensors = (work.keys, work.similarity_keys, getattr(work, "queries", None), getattr(work, "attention", None))
    kinds = tuple(None if tensor is None else (tensor.dtype, tensor.shape[0], tensor.shape[-1]) for tensor in tensors[:3])
    return type(work), work.kv_heads, kinds, tensors[3] is not None


def take_batch(waiting: list[Unit], max_bytes: int) -> list[Unit]:
    """Removes the next batch from `waiting` (oldest first): layers of one shape, `max_bytes` together but at least one;
    or one step over all layers of a prompt.
    """
    if not waiting:
        return []
    first = waiting[0]
    if not isinstance(first, Task):
        return [waiting.pop(0)]
    shape, size = shape_of(first.work), 0
    batch: list[Unit] = []
    rest: list[Unit] = []
    for unit in waiting:
        if not isinstance(unit, Task) or shape_of(unit.work) != shape or (batch and size + unit.size > max_bytes):
            rest.append(unit)
            continue
        batch.append(unit)
        size += unit.size
    waiting[:] = rest
    return batch


def split(batch: list[Task]) -> Iterable[list[Task]]:
    """The batch in two halves, for when it does not fit the device's memory."""
    middle = len(batch) // 2
    return batch[:middle], batch[middle:]
