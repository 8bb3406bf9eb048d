"""Bytes: every dtype, views and slices, and chunks that find their place whatever the layout, the range and the cut."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
from graphkv_proto import tensors
from graphkv_proto.encodings import ENCODINGS
from graphkv_proto.messages import Descriptor
from hypothesis import given
from hypothesis import strategies as st

from graphkv.terms.errors import InvalidInputError, Reason

Array = npt.NDArray[Any]
SHAPES = {
    "keys": ("H", "n", "d"),
    "similarity_keys": ("H", "n", "d"),
    "queries": ("H", "w", "d"),
    "attention": ("H", "w", "n"),
    "scores": ("H", "n"),
    "value_norms": ("H", "n"),
    "positions": ("H", "n"),
    "query_covariance": ("H", "d", "d"),
    "row_facts": ("H", "w"),
}
HEADED = ("keys", "similarity_keys", "queries")


def numbers(dtype: str, dims: tuple[int, ...], seed: int = 0) -> Array:
    data = np.random.default_rng(seed).integers(0, 256, math.prod(dims) * tensors.item_size(dtype), np.uint8)
    return data.view(tensors.DTYPES[dtype]).reshape(dims)


def cut(data: bytes, at: list[int]) -> Iterator[tuple[int, bytes]]:
    """Pieces of `data` as cut at these places, in order, none empty."""
    bounds = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    for start, stop in pairwise(bounds):
        yield start, data[start:stop]


@given(st.data())
def test_chunks_find_their_place(data: st.DataObject) -> None:
    """Any role, dtype, layout, split into token ranges in any order and cut into chunks anywhere gives the whole tensor."""
    role = data.draw(st.sampled_from(sorted(SHAPES)))
    dtype = data.draw(st.sampled_from(sorted(tensors.DTYPES)))
    layout = data.draw(st.sampled_from(["HND", "NHD"])) if role in HEADED else "HND"
    sizes = {"H": data.draw(st.integers(1, 3)), "w": data.draw(st.integers(1, 3)), "d": data.draw(st.sampled_from([1, 3, 8]))}
    n = sizes["n"] = data.draw(st.integers(1, 13))
    dims = tuple(sizes[letter] for letter in SHAPES[role])
    if role == "positions" and data.draw(st.booleans()):
        dims = (n,)
    whole = numbers(dtype, dims)
    held = np.full(whole.nbytes + 2, 0xA5, np.uint8)  # poisoned, and a canary on either side
    memory = held[1:-1]
    ranges: list[tuple[int, int]] = [(0, 0)]
    if "n" in SHAPES[role] and data.draw(st.integers(0, 4)):
        bounds = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))})
        ranges = data.draw(st.permutations([(a, b - a) for a, b in pairwise(bounds)]))
    for start, count in ranges:
        axis = tensors.TOKEN_AXIS.get(role, 0) % len(dims)
        part = whole.take(range(start, start + count), axis) if count else whole
        given = part.swapaxes(0, 1) if layout == "NHD" else part
        sent = given.tobytes()
        descriptor = Descriptor(0, 0, 0, role, dtype, given.shape, layout, start, count, len(sent))
        for offset, chunk in cut(sent, data.draw(st.lists(st.integers(0, 2**20), max_size=5))):
            tensors.place(chunk, offset, descriptor, memory, dims)
    assert memory.tobytes() == whole.tobytes()
    assert (held[0], held[-1]) == (0xA5, 0xA5)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("size", [1, 7, 63, 64, 1000])
def test_equal_chunks_of_odd_ranges(layout: str, size: int) -> None:
    whole = numbers("bf16", (3, 17, 5))
    memory = np.full(whole.nbytes, 0xA5, np.uint8)
    for start, stop in ((9, 17), (0, 4), (4, 5), (5, 9)):
        part = whole[:, start:stop]
        given = part.swapaxes(0, 1) if layout == "NHD" else part
        descriptor = Descriptor(0, 0, 0, "keys", "bf16", given.shape, layout, start, stop - start, given.nbytes)
        for offset, chunk in tensors.slices(given, size):
            tensors.place(chunk, offset, descriptor, memory, whole.shape)
    np.testing.assert_array_equal(tensors.array_of(memory, "bf16", whole.shape), whole)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_a_chunk_may_be_any_buffer(kind: Any) -> None:
    descriptor = Descriptor(0, 0, 0, "scores", "f32", (1, 2), "HND", 0, 2, 8)
    memory = np.zeros(8, np.uint8)
    tensors.place(kind(b"abcd"), 4, descriptor, memory, (1, 2))
    assert memory.tobytes() == b"\0\0\0\0abcd"


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 17), (16, 1), (2**62, 1), (12, 5)], ids=str)
@pytest.mark.parametrize("count", [2, 4], ids=["a range", "the whole"])
def test_a_chunk_outside_its_tensor_writes_nothing(offset: int, length: int, count: int) -> None:
    dims = (2, count, 2)
    descriptor = Descriptor(0, 0, 0, "keys", "i8", dims, "HND", 0, count, 16)
    memory = np.zeros(16, np.uint8)
    with pytest.raises(InvalidInputError) as caught:
        tensors.place(b"x" * length, offset, descriptor, memory, (2, 4, 2))
    assert caught.value.reason == Reason.BAD_LAYOUT
    assert not memory.any()


@pytest.mark.parametrize("dtype", sorted(tensors.DTYPES))
def test_every_dtype_is_bytes_and_back(dtype: str) -> None:
    array = numbers(dtype, (3, 5))
    got = tensors.array_of(tensors.byte_view(array).tobytes(), dtype, (3, 5))
    assert got.dtype == tensors.DTYPES[dtype]
    assert got.tobytes() == array.tobytes()
    assert tensors.item_size(dtype) == array.itemsize


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float64", "f64"), ("float32", "f32"), ("float16", "f16"), ("int8", "i8"), ("int32", "i32"), ("int64", "i64")],
)
def test_dtype_names(name: str, dtype: str) -> None:
    assert tensors.dtype_name("keys", np.zeros(1, name)) == dtype
    assert tensors.dtype_name("keys", np.zeros(1, np.dtype(name).newbyteorder(">"))) == dtype


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", "bf16"), ("float8_e4m3fn", "f8_e4m3fn"), ("float8_e5m2", "f8_e5m2")])
def test_dtype_names_of_ml_dtypes(name: str, dtype: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.arange(6).astype(getattr(ml_dtypes, name))
    assert tensors.dtype_name("keys", array) == dtype
    assert tensors.byte_view(array).tobytes() == array.tobytes()


@pytest.mark.parametrize("name", ["uint16", "int16", "bool", "complex64", "object", "U3", "datetime64[s]"])
def test_a_dtype_that_is_none_of_the_contract(name: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        tensors.dtype_name("keys", np.zeros(1, name))
    assert (caught.value.argument, caught.value.reason) == ("keys", Reason.BAD_SHAPE)


def test_contiguous_bytes_are_a_view() -> None:
    array = numbers("f32", (3, 5))
    assert np.shares_memory(tensors.byte_view(array), array)
    assert all(np.shares_memory(part, array) for _, part in tensors.slices(array, 7))


def test_big_endian_numbers_travel_little_endian() -> None:
    array = np.arange(5, dtype=">f4")
    assert tensors.byte_view(array).tobytes() == array.astype("<f4").tobytes()


VIEWS = {
    "contiguous": lambda array: array,
    "transposed": lambda array: array.swapaxes(0, 1),
    "every other": lambda array: array[:, ::2],
    "reversed": lambda array: array[::-1],
    "broadcast": lambda array: np.broadcast_to(array[:1], array.shape),
    "a column": lambda array: array[:, 0, 0],
    "big-endian": lambda array: array.astype(">f4"),
    "big-endian, strided": lambda array: array.astype(">f4").swapaxes(0, 2),
    "empty": lambda array: array[:, :0],
}


@pytest.mark.parametrize("size", [1, 7, 8, 20, 10**6])
@pytest.mark.parametrize("view", VIEWS)
def test_slices_are_the_bytes_in_order(view: str, size: int) -> None:
    array = VIEWS[view](numbers("f32", (3, 5, 2)))
    got = list(tensors.slices(array, size))
    assert b"".join(part.tobytes() for _, part in got) == array.astype("<f4").tobytes()
    assert [offset for offset, _ in got] == list(np.cumsum([0, *(len(part) for _, part in got)])[:-1])
    assert all(0 < len(part) <= size for _, part in got)


@given(st.binary(max_size=99), st.lists(st.integers(0, 99), max_size=4))
def test_the_checksum_does_not_depend_on_the_cut(data: bytes, at: list[int]) -> None:
    crc = 0
    for _, part in cut(data, at) if data else ():
        crc = tensors.checksum(np.frombuffer(part, np.uint8), crc)
    assert crc == tensors.checksum(data) == google_crc32c.value(data)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_encodings_give_back_what_they_promise(name: str, dtype: str) -> None:
    encoding = ENCODINGS[name]
    array = np.random.default_rng(1).standard_normal((2, 5, 3)).astype(np.float32).astype(tensors.DTYPES[dtype])
    decoded = encoding.decode(*encoding.encode(array))
    assert decoded.shape == array.shape
    if encoding.exact:
        assert decoded.tobytes() == array.tobytes()
