"""Arrays as callers have them (numpy, torch, anything with DLPack) as torch tensors, and answers back in their kind."""

from typing import Any

import torch
import torch.utils.dlpack

from graphkv.rows import lengths
from graphkv.terms.errors import Reason, invalid

__all__ = ["floating", "heads_first", "like", "to_torch", "value_norms"]

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_ML_DTYPES = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def to_torch(argument: str, array: Any) -> torch.Tensor:
    """The array as a torch tensor that shares its memory; ml_dtypes' bfloat16 and float8 are read as torch's."""
    if isinstance(array, torch.Tensor):
        if array.layout != torch.strided or array.device.type == "meta":
            given = f"{array.layout} on {array.device}"
            raise invalid(argument, given, "a dense tensor that holds its numbers", reason=Reason.BAD_SHAPE)
        return array.detach()
    if hasattr(array, "__array_interface__"):
        return _from_numpy(argument, array)
    if hasattr(array, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(array)
    raise invalid(
        argument, type(array).__name__, "a numpy array, a torch tensor or an array with DLPack", reason=Reason.BAD_SHAPE
    )


def _from_numpy(argument: str, array: Any) -> torch.Tensor:
    """Copies only what torch cannot read in place: read-only memory, negative strides, foreign byte order."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    elif not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    foreign = _ML_DTYPES.get(array.dtype.name)
    try:
        if foreign is None:
            return torch.from_numpy(array)
        return torch.from_numpy(array.view(f"uint{8 * foreign.itemsize}")).view(foreign)
    except TypeError:
        raise invalid(argument, str(array.dtype), "numbers that torch knows", reason=Reason.BAD_SHAPE) from None


def floating(argument: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, if its dtype is one of ours; an error naming the argument otherwise."""
    if tensor.dtype not in FLOATS:
        raise invalid(argument, str(tensor.dtype), "float64, float32, float16, bfloat16 or float8", reason=Reason.BAD_SHAPE)
    return tensor


def heads_first(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """`[..., heads, tokens, d]` as a view, whatever the layout: "HND" or "NHD"."""
    return tensor.transpose(-3, -2) if layout == "NHD" else tensor


def value_norms(values: torch.Tensor) -> torch.Tensor:
    """float32 [Hkv, n]: the length of each token's value, summed in float64; values [Hkv, n, any]."""
    if values.ndim != 3:
        raise invalid("values", list(values.shape), "[Hkv, n, any] in each layer", reason=Reason.BAD_SHAPE)
    floating("values", values)
    return torch.stack([lengths(head).to(torch.float32) for head in values])


def like(answer: torch.Tensor, given: Any) -> Any:
    """The answer in the caller's kind: torch on its device for torch and DLPack, numpy for numpy."""
    if isinstance(given, torch.Tensor) or not hasattr(given, "__array_interface__"):
        return answer
    return answer.cpu().numpy()
