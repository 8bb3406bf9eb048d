"""Descriptor, Chunk and End: what comes after the header, as plain values."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from graphkv.terms.errors import Reason, invalid, unknown_name
from graphkv_proto import v1 as pb
from graphkv_proto.messages import _names as names
from graphkv_proto.messages.header import Header, write_header
from graphkv_proto.tensors import item_size

__all__ = [
    "AXES",
    "MAX_TENSOR_BYTES",
    "Descriptor",
    "End",
    "read_descriptor",
    "read_end",
    "write_chunk",
    "write_descriptor",
    "write_end",
    "write_request",
]

MAX_TENSOR_BYTES = 2**48
"""No machine holds a tensor of that size."""
_MAX_DIM = 2**31 - 1
AXES: Mapping[str, tuple[str, ...]] = {
    "keys": ("Hkv, n, d",),
    "similarity_keys": ("Hkv, n, x",),
    "positions": ("n", "Hkv, n"),
    "queries": ("Hq, w, d",),
    "attention": ("Hq, w, n",),
    "scores": ("Hkv, n",),
    "value_norms": ("Hkv, n",),
    "query_mean": ("Hq, d",),
    "query_covariance": ("Hq, d, d",),
    "candidate_ids": ("Hkv, W",),
    "scales": ("1 or Hkv", "Hkv, n"),
    "row_facts": ("Hkv, 3",),
}
"""The axes that each role may have, heads first; W in place of n in the narrowed form."""
_RANKS = {role: tuple(axes.count(",") + 1 for axes in forms) for role, forms in AXES.items()}


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One tensor of one layer of one prompt, or the `count` tokens of it from `start` on.

    role, dtype and layout are names of the contract ("keys", "bf16", "HND"); dims are its own axes in its layout's order.
    count 0: it is no range of tokens (see the message Descriptor). byte_length: the product of dims times the item size.
    """

    id: int
    prompt: int
    layer: int
    role: str
    dtype: str
    dims: tuple[int, ...]
    layout: str = "HND"
    start: int = 0
    count: int = 0
    byte_length: int = 0


@dataclass(frozen=True, slots=True)
class End:
    """How much a whole request was: its descriptors, its bytes in chunks, and their CRC32C in the order sent."""

    descriptors: int
    bytes: int
    crc32c: int


def write_descriptor(descriptor: Descriptor) -> pb.Descriptor:
    """Raises InvalidInputError where a name is none of the contract."""
    return pb.Descriptor(
        id=descriptor.id,
        prompt=descriptor.prompt,
        layer=descriptor.layer,
        role=names.ROLE.label(descriptor.role, "descriptor.role"),
        dtype=names.DTYPE.label(descriptor.dtype, "descriptor.dtype"),
        dims=descriptor.dims,
        layout=names.LAYOUT.label(descriptor.layout, "descriptor.layout"),
        start=descriptor.start,
        count=descriptor.count,
        byte_length=descriptor.byte_length,
    )


def read_descriptor(message: pb.Descriptor) -> Descriptor:
    """Checked in itself: names, signs, the number of axes, and that the bytes are those of the dims.

    Whether it fits the header, the policy and a server's limits is the server's to say. Raises InvalidInputError:
    BAD_SHAPE (argument: the role, where its dims are wrong), TOO_LARGE, UNKNOWN_NAME.
    """
    role = names.ROLE.read(message.role, "descriptor.role")
    dtype = names.DTYPE.read(message.dtype, "descriptor.dtype")
    layout = names.LAYOUT.read(message.layout, "descriptor.layout")
    place = message.WhichOneof("place")
    if place is not None:
        raise unknown_name("descriptor.place", place, ("chunks",))
    for name in ("id", "prompt", "layer", "start", "count", "byte_length"):
        given = getattr(message, name)
        if given < 0:
            raise invalid(f"descriptor.{name}", given, "an integer >= 0", reason=Reason.BAD_SHAPE)
    if len(message.dims) not in _RANKS[role] or not all(1 <= size <= _MAX_DIM for size in message.dims):
        forms = " or ".join(f"[{axes}]" for axes in AXES[role])
        allowed = f"{forms}, each axis from 1 to {_MAX_DIM}"
        raise invalid(role, list(message.dims[:8]), allowed, reason=Reason.BAD_SHAPE)
    if message.byte_length > MAX_TENSOR_BYTES:
        raise invalid("descriptor.byte_length", message.byte_length, f"at most {MAX_TENSOR_BYTES}", reason=Reason.TOO_LARGE)
    dims = tuple(message.dims)
    length = math.prod(dims) * item_size(dtype)
    if message.byte_length != length:
        allowed = f"{length}, the bytes of {role} {list(dims)} in {dtype}"
        raise invalid("descriptor.byte_length", message.byte_length, allowed, reason=Reason.BAD_SHAPE)
    return Descriptor(
        message.id,
        message.prompt,
        message.layer,
        role,
        dtype,
        dims,
        layout,
        message.start,
        message.count,
        message.byte_length,
    )


def write_chunk(descriptor: int, offset: int, data: Any) -> pb.Chunk:
    """The next bytes of the tensor with this id: `data` is bytes, or anything with the buffer protocol (copied once)."""
    return pb.Chunk(descriptor=descriptor, offset=offset, data=data if isinstance(data, bytes) else bytes(memoryview(data)))


def write_end(end: End) -> pb.End:
    """The last part of a request."""
    return pb.End(descriptors=end.descriptors, bytes=end.bytes, crc32c=end.crc32c)


def read_end(message: pb.End) -> End:
    """Raises InvalidInputError where a count is negative."""
    for name in ("descriptors", "bytes"):
        given = getattr(message, name)
        if given < 0:
            raise invalid(f"end.{name}", given, "an integer >= 0", reason=Reason.BAD_SHAPE)
    return End(message.descriptors, message.bytes, message.crc32c)


def write_request(
    *,
    header: Header | None = None,
    descriptors: Iterable[Descriptor] = (),
    chunks: Iterable[pb.Chunk] = (),
    end: End | None = None,
) -> pb.SelectRequest:
    """One message of a request; a small call is one message with all of it."""
    return pb.SelectRequest(
        header=None if header is None else write_header(header),
        descriptors=[write_descriptor(each) for each in descriptors],
        chunks=chunks,
        end=None if end is None else write_end(end),
    )
