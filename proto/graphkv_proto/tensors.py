"""Arrays as wire bytes and back: dtypes by name, chunks, and where a chunk's bytes belong. The one place that knows.

numpy has neither bfloat16 nor float8: those travel as raw bytes, uint16 and uint8 here. Knows no message and no torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import google_crc32c
import numpy as np
import numpy.typing as npt

from graphkv.terms.errors import Reason, invalid

__all__ = [
    "CHUNK_BYTES",
    "DTYPES",
    "TOKEN_AXIS",
    "array_of",
    "byte_view",
    "checksum",
    "dtype_name",
    "item_size",
    "place",
    "slices",
]

CHUNK_BYTES = 2**20
"""64 KiB and 16 MiB both measured slower."""
TOKEN_AXIS: Mapping[str, int] = {
    "keys": 1,
    "similarity_keys": 1,
    "attention": 2,
    "scores": 1,
    "value_norms": 1,
    "positions": -1,
}
"""The axis of a role (heads first) along which its tokens may come in ranges."""
DTYPES: Mapping[str, np.dtype[Any]] = {
    "f64": np.dtype("<f8"),
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "f8_e4m3fn": np.dtype("u1"),
    "f8_e5m2": np.dtype("u1"),
    "i8": np.dtype("i1"),
    "i32": np.dtype("<i4"),
    "i64": np.dtype("<i8"),
}
"""What numpy sees of each dtype of the contract."""
_BY_NAME = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",  # these three as ml_dtypes names them
    "float8_e4m3fn": "f8_e4m3fn",
    "float8_e5m2": "f8_e5m2",
    "int8": "i8",
    "int32": "i32",
    "int64": "i64",
}

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


class Range(Protocol):
    """What `place` reads of a `messages.Descriptor`."""

    @property
    def role(self) -> str:
        """A role's name."""
        ...

    @property
    def dtype(self) -> str:
        """A dtype's name."""
        ...

    @property
    def layout(self) -> str:
        """HND or NHD."""
        ...

    @property
    def start(self) -> int:
        """The first token."""
        ...

    @property
    def count(self) -> int:
        """How many tokens; 0: no range."""
        ...

    @property
    def byte_length(self) -> int:
        """All of its bytes."""
        ...


def item_size(dtype: str) -> int:
    """Bytes of one number."""
    return DTYPES[dtype].itemsize


def dtype_name(argument: str, array: Array) -> str:
    """The contract's name of an array's dtype, ml_dtypes' own included. Raises InvalidInputError where it has none."""
    name = _BY_NAME.get(array.dtype.name)
    if name is None:
        allowed = f"one of {', '.join(_BY_NAME)}"
        raise invalid(argument, array.dtype.name, allowed, reason=Reason.BAD_SHAPE)
    return name


def byte_view(array: Array) -> Bytes:
    """All bytes of an array as uint8, little-endian and row-major; a copy only where it is neither."""
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and not np.little_endian):
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def array_of(data: Any, dtype: str, dims: Sequence[int]) -> Array:
    """The array that these bytes are, without a copy. Raises ValueError where they are not as many."""
    return np.frombuffer(data, DTYPES[dtype]).reshape(dims)


def slices(array: Array, size: int = CHUNK_BYTES) -> Iterator[tuple[int, Bytes]]:
    """The array's bytes in row-major order as (offset, at most `size` bytes).

    Views where it is contiguous; else no more is copied at a time than `size`, or one entry of the first axis.
    """
    if array.flags.c_contiguous or array.ndim < 2:
        data = byte_view(array)
        for offset in range(0, len(data), size):
            yield offset, data[offset : offset + size]
        return
    entry = math.prod(array.shape[1:]) * array.itemsize
    step = max(1, size // max(1, entry))
    for first in range(0, len(array), step):
        for offset, part in slices(np.ascontiguousarray(array[first : first + step]), size):
            yield first * entry + offset, part


def checksum(data: Any, crc: int = 0) -> int:
    """CRC32C of `data` (bytes or a uint8 array) after bytes whose checksum is `crc`."""
    return int(google_crc32c.extend(crc, data))


def place(chunk: Any, offset: int, descriptor: Range, memory: Bytes, dims: Sequence[int]) -> None:
    """Copies bytes `offset` and following of a descriptor to their place in the memory of the whole role.

    memory: all bytes of the role, heads first, whose axes are `dims` with all n tokens. The descriptor's dims have been
    checked against them. Tokens first or a range of tokens is copied in strides; the rest is one run. Raises
    InvalidInputError (BAD_LAYOUT) where the chunk is not inside the descriptor.
    """
    data = np.frombuffer(chunk, np.uint8)
    if not 0 <= offset <= descriptor.byte_length - len(data):
        allowed = f"inside the {descriptor.byte_length} bytes of the tensor"
        raise invalid("chunk", f"{len(data)} bytes at {offset}", allowed, reason=Reason.BAD_LAYOUT)
    axis = TOKEN_AXIS.get(descriptor.role, 1) % len(dims)
    heads, tokens = math.prod(dims[:axis]), dims[axis]
    if descriptor.layout == "HND" and descriptor.count in (0, tokens):
        memory[offset : offset + len(data)] = data
        return
    start, count = descriptor.start, descriptor.count or tokens
    target = memory.reshape(heads, tokens, -1)[:, start : start + count]
    if descriptor.layout == "NHD":
        _fill(target.swapaxes(0, 1), offset, data)
    else:
        _fill(memory.reshape(heads, -1)[:, start * target.shape[2] : (start + count) * target.shape[2]], offset, data)


def _fill(target: Bytes, offset: int, data: Bytes) -> None:
    """Writes `data` into a strided array from its row-major position `offset` on: a part of an entry, entries, a part."""
    if target.ndim == 1:
        target[offset : offset + len(data)] = data
        return
    size = math.prod(target.shape[1:])
    entry, inside = divmod(offset, size)
    if inside:
        first = data[: size - inside]
        _fill(target[entry], inside, first)
        entry, data = entry + 1, data[len(first) :]
    whole = len(data) // size
    target[entry : entry + whole] = data[: whole * size].reshape(whole, *target.shape[1:])
    if len(data) > whole * size:
        _fill(target[entry + whole], 0, data[whole * size :])
