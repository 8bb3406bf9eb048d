"""Which layers are computed together: the oldest, and every other of the same shape, whoever sent it.

Rows (one KV head of one layer of one prompt) are independent, so a batch changes no answer. Knows no thread and no call.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from graphkv.candidates import Candidates
from graphkv.layer import Layer

__all__ = ["Task", "shape_of", "split", "take_batch"]


@dataclass(eq=False, slots=True)
class Task:
    """One layer on its way through the engine.

    owner: the job it belongs to, opaque here. size: bytes of its tensors. queued_at: by the engine's clock.
    """

    owner: Any
    work: Layer | Candidates
    lease: Any
    prompt: int
    size: int
    queued_at: float = 0.0

    @property
    def rows(self) -> int:
        """Rows in this layer: its KV heads."""
        return self.work.kv_heads


def shape_of(work: Layer | Candidates) -> Hashable:
    """Equal for layers that can share a launch: the form, KV heads, the sizes and dtypes of what is compared."""
    tensors = (work.keys, work.similarity_keys, getattr(work, "queries", None), getattr(work, "attention", None))
    kinds = tuple(None if tensor is None else (tensor.dtype, tensor.shape[0], tensor.shape[-1]) for tensor in tensors[:3])
    return type(work), work.kv_heads, kinds, tensors[3] is not None


def take_batch(waiting: list[Task], max_bytes: int) -> list[Task]:
    """Removes the next batch from `waiting` (oldest first): of one shape, `max_bytes` together but at least one layer."""
    if not waiting:
        return []
    shape, size = shape_of(waiting[0].work), 0
    batch: list[Task] = []
    rest: list[Task] = []
    for task in waiting:
        if shape_of(task.work) == shape and (not batch or size + task.size <= max_bytes):
            batch.append(task)
            size += task.size
        else:
            rest.append(task)
    waiting[:] = rest
    return batch


def split(batch: list[Task]) -> Iterable[list[Task]]:
    """The batch in two halves, for when it does not fit the device's memory."""
    middle = len(batch) // 2
    return batch[:middle], batch[middle:]
