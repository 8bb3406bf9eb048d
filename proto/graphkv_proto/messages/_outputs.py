"""What an answer holds besides the tokens, as messages and back; the enum Output says what each looks like.

Whoever gathers with an output, perhaps on a GPU, can trust what was read: token ids, ranges and rows are those of the prompt.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from graphkv.terms.catalogue import OUTPUTS
from graphkv.terms.errors import InternalError, InvalidInputError
from graphkv_proto import v1 as pb
from graphkv_proto.messages import _names as names
from graphkv_proto.tensors import DTYPES, array_of, byte_view

__all__ = ["read_outputs", "unreadable", "write_outputs"]

_DTYPES: Mapping[str, str] = {
    "updated_scores": "f32",
    "keep_mask": "i8",
    "decay_factors": "f32",
    "choice_order": "i32",
    "dropped_ranges": "i32",
    "moves": "i32",
}
_TRIPLES = ("dropped_ranges", "moves")
"""[any, 3], which begin with their row; the others have an entry a row."""

Array = npt.NDArray[Any]


def write_outputs(outputs: Mapping[str, Any], *, shared: bool) -> list[pb.OutputTensor]:
    """outputs: arrays by name, numpy or torch on the CPU; shared: rows share the answer, so that no array has their axis."""
    written = []
    for name, given in outputs.items():
        label = names.OUTPUT.label(name, "outputs")
        array = np.asarray(given).astype(DTYPES[_DTYPES[name]], copy=False)
        if shared and name not in _TRIPLES:
            array = array[None]
        dtype = names.DTYPE.label(_DTYPES[name], "outputs")
        written.append(pb.OutputTensor(output=label, dtype=dtype, dims=array.shape, data=byte_view(array).tobytes()))
    return written


def read_outputs(given: Iterable[pb.OutputTensor], *, rows: int, num_tokens: int, shared: bool) -> dict[str, Array]:
    """The outputs of an answer of `rows` rows, in the order sent; those of shared answers without the rows' axis.

    Raises InternalError where one came twice, is none, or is not what its name says.
    """
    found: dict[str, Array] = {}
    for message in given:
        try:
            name = names.OUTPUT.read(message.output, "output", OUTPUTS)
            dtype = names.DTYPE.read(message.dtype, f"the dtype of {name}", (_DTYPES[name],))
        except InvalidInputError as error:
            raise unreadable(error.message) from None
        if name in found:
            raise unreadable(f"it has {name} twice")
        dims = tuple(message.dims)
        if not _fit(name, dims, rows, num_tokens):
            raise unreadable(f"its {name} are {list(dims[:8])}, for {rows} rows of {num_tokens} tokens")
        try:
            array = array_of(message.data, dtype, dims).copy()  # what a caller gets must be writable
        except ValueError:
            raise unreadable(f"its {name} {list(dims)} are {len(message.data)} bytes") from None
        if not _sound(name, array, rows, num_tokens):
            raise unreadable(f"its {name} are not those of {rows} rows of {num_tokens} tokens")
        own = array[0] if shared and name not in _TRIPLES else array
        found[name] = own.astype(np.bool_) if name == "keep_mask" else own
    return found


def _fit(name: str, dims: tuple[int, ...], rows: int, tokens: int) -> bool:
    """Whether these are an output's axes."""
    if len(dims) != 2:
        return False
    if name in _TRIPLES:
        return 0 <= dims[0] <= rows * tokens and dims[1] == 3
    return dims[0] == rows and (0 <= dims[1] <= tokens if name == "choice_order" else dims[1] == tokens)


def _sound(name: str, array: Array, rows: int, tokens: int) -> bool:
    """Whether the numbers can be what they stand for."""
    if not array.size:
        return True
    if name == "keep_mask":
        return bool(array.min() >= 0 and array.max() <= 1)
    if name == "choice_order":
        return bool(array.min() >= -1 and array.max() < tokens)
    if name not in _TRIPLES:
        return True
    row, first, second = array.T
    inside = row.min() >= 0 and row.max() < rows and array.min() >= 0
    if name == "dropped_ranges":
        return bool(inside and second.max() <= tokens and (first < second).all())
    return bool(inside and first.max() < tokens and second.max() < tokens)


def unreadable(what: str) -> InternalError:
    """An answer that is none: the server's mistake."""
    return InternalError(f"the server's answer cannot be read: {what}")
