"""Arrays that torch or numpy alone would stumble over: they work, or are refused by name before anything is sent."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graphkv_client import CompressClient, InvalidInputError, Policy

import graphkv

POLICY = Policy(50)


def swapped(array: Any) -> Any:
    return array.astype(array.dtype.newbyteorder(">"))


def backwards(array: Any) -> Any:
    """The same numbers at negative strides."""
    return np.ascontiguousarray(array[:, :, ::-1])[:, :, ::-1]


def unaligned(array: Any) -> Any:
    """The same numbers as a field between bytes of others, as a structured array has them."""
    held = np.empty(array.shape, np.dtype([("before", "u1"), ("number", array.dtype)]))
    held["number"] = array
    return held["number"]


def read_only(array: Any) -> Any:
    own = array.copy()
    own.flags.writeable = False
    return own


@pytest.mark.parametrize("foreign", [swapped, backwards, unaligned, read_only])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy keys", "torch keys"])
def test_queries_of_any_memory(client: CompressClient, prompt: dict[str, Any], kind: Any, foreign: Any) -> None:
    wanted = graphkv.select(**prompt, policy=POLICY)
    found = client.select(kind(prompt["keys"]), queries=foreign(prompt["queries"]), policy=POLICY)
    for ours, right in zip(found.indices, wanted.indices, strict=True):
        assert np.array_equal(np.asarray(ours), right)


@pytest.mark.parametrize("foreign", [swapped, backwards, unaligned, lambda keys: torch._neg_view(-torch.from_numpy(keys))])
def test_keys_of_any_memory(client: CompressClient, prompt: dict[str, Any], foreign: Any) -> None:
    wanted = graphkv.select(**prompt, policy=POLICY)
    found = client.select(foreign(prompt["keys"]), queries=prompt["queries"], policy=POLICY)
    for ours, right in zip(found.indices, wanted.indices, strict=True):
        assert np.array_equal(np.asarray(ours), right)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "objects": lambda array: array.astype(object),
    "text": lambda array: array.astype(str),
    "times": lambda array: array.astype("timedelta64[s]"),
    "meta": lambda array: torch.from_numpy(array).to("meta"),
    "sparse": lambda array: torch.from_numpy(array).to_sparse(),
    "nested": lambda array: torch.nested.as_nested_tensor(list(torch.from_numpy(array))),
    "lists": lambda array: array.tolist(),
    "a name": lambda array: "cache",
}


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("role", ["keys", "queries"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_numbers_is_refused_by_name(
    client: CompressClient, prompt: dict[str, Any], name: str, role: str, kind: Any
) -> None:
    given = {own: kind(array) for own, array in prompt.items()} | {role: REFUSED[name](prompt[role])}
    with pytest.raises(InvalidInputError) as raised:
        client.select(**given, policy=POLICY)
    assert raised.value.argument in (role, "queries")  # keys that are lists of lists are read as a batch
    layer = {own: array[1] for own, array in given.items() if own != role} | {role: REFUSED[name](prompt[role][1])}
    with client.stream(num_layers=2, policy=POLICY) as stream:
        with pytest.raises(InvalidInputError) as raised:
            stream.put(1, **layer)
        assert raised.value.argument == role
