"""Arrays of any kind callers have: read without a copy, looked at by dims and dtype, answered in kind on their device.

Whatever comes is numpy or torch afterwards. torch is never imported for numpy arrays: who hands us a tensor has it
loaded already. Only an array that numpy cannot read (on a GPU, or bfloat16 without ml_dtypes) needs it. Knows no role,
no layer and no wire.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphkv.terms.errors import InvalidInputError, Reason, invalid

__all__ = [
    "Answer",
    "Array",
    "Raw",
    "answer_like",
    "as_float32",
    "as_torch_reads",
    "concatenated",
    "copied",
    "dtype_name",
    "host_view",
    "is_tensor",
    "read",
    "recorded_event",
    "torch_module",
    "wait_for",
    "zeros",
]

Array = Any
"""A numpy array, a torch tensor, or anything that speaks DLPack."""

Raw = npt.NDArray[Any]
Answer = Callable[[Raw], Any]
"""What turns a numpy array of an answer into the caller's kind, on its device."""

DTYPE_NAMES = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "f8_e4m3fn",
    "float8_e5m2": "f8_e5m2",
    "int32": "i32",
    "int64": "i64",
}
"""Names of dtypes, the same in numpy (with ml_dtypes) and torch, and as graphkv_proto has them."""
INTEGER_ROLES = ("positions", "candidate_ids")

_RAW = {"bf16": "uint16", "f8_e4m3fn": "uint8", "f8_e5m2": "uint8"}
_DLPACK_HOST = (1, 3)  # kDLCPU, kDLCUDAHost: memory that this process reads


def read(argument: str, array: Array) -> Any:
    """The array as a numpy array or a torch tensor that shares its memory.

    Raises InvalidInputError where it is neither nor speaks DLPack, or where torch is needed and missing.
    """
    if isinstance(array, np.ndarray):
        return array
    if is_tensor(array):
        return _strided(argument, array.detach())
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _from_dlpack(argument, array)
    allowed = "a numpy array, a torch tensor or an array with DLPack"
    raise invalid(argument, type(array).__name__, allowed, reason=Reason.BAD_SHAPE)


def is_tensor(array: object) -> bool:
    """Whether it is a torch tensor. Does not import torch: no tensor exists before somebody did."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def torch_module(argument: str, what: str) -> Any:
    """torch, imported now; InvalidInputError naming the extra where it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        message = f"{argument}: {what} needs torch, which is not installed: pip install 'graphkv[torch]'"
        raise InvalidInputError(message, argument=argument) from error


def dtype_name(argument: str, array: Any) -> str:
    """The wire's name of the array's dtype ("bf16"); InvalidInputError where the wire has none."""
    given = getattr(array.dtype, "name", None) or str(array.dtype).removeprefix("torch.")
    name = DTYPE_NAMES.get(given)
    integers = argument in INTEGER_ROLES
    if name is None or name.startswith("i") is not integers:
        allowed = "int32 or int64" if integers else "float64, float32, float16, bfloat16 or float8"
        raise invalid(argument, given, allowed, reason=Reason.BAD_SHAPE)
    return name


def host_view(argument: str, array: Any) -> tuple[Raw, str]:
    """The array as numpy in host memory and its wire dtype; bfloat16 and float8 as the unsigned integers of their bits.

    Shares memory where it is in host memory already; strides stay as they are.
    """
    name = dtype_name(argument, array)
    raw = _RAW.get(name)
    if is_tensor(array):
        torch = sys.modules["torch"]
        array = array.cpu()
        array = (array.view(getattr(torch, raw)) if raw else array).numpy()
    elif raw:
        array = array.view(raw)
    return array, name


def as_float32(array: Any) -> Any:
    """The array as float32, itself where it is one already; larger numbers become infinite, which is refused by name."""
    if is_tensor(array):
        return array.float()
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def as_torch_reads(array: Any) -> Any:
    """The array; a copy of a numpy array that torch cannot view: of foreign byte order, or with strides it has not."""
    if is_tensor(array):
        return array
    if not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    viewable = array.flags.aligned and all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    return array if viewable else array.copy()


def norms(argument: str, array: Any) -> Any:
    """float32 [heads, n]: the length of each vector of [heads, n, any], summed in float64, where the array is."""
    if array.ndim != 3:
        raise invalid(argument, list(array.shape), "[heads, n, any]", reason=Reason.BAD_SHAPE)
    if is_tensor(array):
        lengths = [head.double().norm(dim=-1).float() for head in array]
        return sys.modules["torch"].stack(lengths)
    with np.errstate(over="ignore"):
        lengths = [np.sqrt(np.square(head.astype(np.float64)).sum(axis=-1)) for head in array]
        return np.stack(lengths).astype(np.float32)


def recorded_event(array: Any) -> Any:
    """A CUDA event after all that the caller's stream has been given to do with the array; None for other devices.

    Whoever reads the array on another thread or stream waits for it.
    """
    if not is_tensor(array) or array.device.type != "cuda":
        return None
    return sys.modules["torch"].cuda.current_stream(array.device).record_event()


def wait_for(event: Any, array: Any) -> None:
    """Makes this thread's stream of the array's device wait for the event, without stopping the thread."""
    if event is not None:
        sys.modules["torch"].cuda.current_stream(array.device).wait_event(event)


def copied(array: Any) -> Any:
    """A copy on the array's device."""
    return array.clone() if is_tensor(array) else array.copy()


def zeros(example: Any, dims: Sequence[int]) -> Any:
    """Zeros in these dims, of the example's kind and dtype, on its device; they take next to no memory."""
    if is_tensor(example):
        return example.new_zeros(()).expand(*dims)
    return np.broadcast_to(np.zeros((), example.dtype), tuple(dims))


def concatenated(arrays: Sequence[Any], axis: int) -> Any:
    """One array of all of them along the axis; all numpy or all torch."""
    if not is_tensor(arrays[0]):
        return np.concatenate(arrays, axis=axis)
    torch = sys.modules["torch"]
    dtype = arrays[0].dtype
    if dtype.itemsize > 1:
        return torch.cat(list(arrays), dim=axis)
    return torch.cat([array.view(torch.uint8) for array in arrays], dim=axis).view(dtype)  # float8 moves as bytes alone


def answer_like(example: Array) -> Answer:
    """The way to the example's kind, on its device. Keeps no reference to the example."""
    if isinstance(example, np.ndarray):
        return _same
    if is_tensor(example):
        return _to_device(example.device)
    namespace = getattr(example, "__array_namespace__", None)
    from_dlpack = getattr(namespace(), "from_dlpack", None) if namespace is not None else None
    if example.__dlpack_device__()[0] in _DLPACK_HOST:
        return from_dlpack if from_dlpack is not None else _same
    device = _from_dlpack("keys", example).device
    return lambda array: (from_dlpack or _same)(_to_device(device)(array))


def _strided(argument: str, tensor: Any) -> Any:
    """The tensor, where it has numbers at strides; InvalidInputError for the other kinds torch has."""
    kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    kind = "meta" if tensor.device.type == "meta" else kind
    if kind != "strided":
        raise invalid(argument, f"a {kind} tensor", "a dense tensor with data", reason=Reason.BAD_SHAPE)
    return tensor.resolve_neg()


def _same(array: Any) -> Any:
    return array


def _to_device(device: Any) -> Answer:
    torch = sys.modules["torch"]
    return lambda array: torch.from_numpy(array).to(device)


def _from_dlpack(argument: str, array: Any) -> Any:
    if array.__dlpack_device__()[0] in _DLPACK_HOST:
        try:
            return np.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError, ValueError):  # numpy has no bfloat16 of its own
            if hasattr(array, "__array__"):  # such libraries bring ml_dtypes
                return np.asarray(array)
        what = "an array that numpy cannot read"
    else:
        what = "an array on a GPU"
    return torch_module(argument, what).from_dlpack(array)
