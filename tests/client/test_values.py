"""values= travel as their norms; whatever is wrong with them is said of `values`, which is what the caller passed."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graphkv_client import AsyncCompressClient, CompressClient, InvalidInputError, Policy
from graphkv_testing.process import Server

import graphkv

TOKENS = 60
READS = Policy(9, scorer="expected_attention")
IGNORES = Policy(9, window=4)

Door = Callable[..., Any]


@pytest.fixture(params=["library", "select", "stream", "async select"])
def door(request: pytest.FixtureRequest, server: Server, client: CompressClient) -> Door:
    async def select_async(**given: Any) -> Any:
        async with AsyncCompressClient(server.address) as own:
            return await own.select(**given)

    def stream(*, policy: Policy, **given: Any) -> Any:
        with client.stream(num_layers=1, policy=policy) as own:
            own.put(0, **{role: array[0] for role, array in given.items()})
            return list(own)

    doors: dict[str, Door] = {
        "library": graphkv.select,
        "select": client.select,
        "stream": stream,
        "async select": lambda **given: asyncio.run(select_async(**given)),
    }
    return doors[request.param]


def inputs(policy: Policy) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    dims = {"keys": (1, 2, TOKENS, 8), "values": (1, 2, TOKENS, 8)}
    if policy is READS:
        dims |= {"query_mean": (1, 4, 8), "query_covariance": (1, 4, 8, 8)}
    else:
        dims |= {"queries": (1, 4, 4, 8)}
    return {role: rng.standard_normal(shape, dtype=np.float32) for role, shape in dims.items()}


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("policy", "values", "reason"),
    [
        (READS, lambda values: values[:, :, :-1].copy(), "BAD_SHAPE"),
        (READS, lambda values: values * np.float32("nan"), "NON_FINITE"),
        (READS, lambda values: values.astype(np.int32), "BAD_SHAPE"),
        (IGNORES, lambda values: values, "BAD_SHAPE"),
    ],
    ids=["too few", "not finite", "integers", "not read"],
)
def test_errors_name_values(door: Door, kind: Any, policy: Policy, values: Any, reason: str) -> None:
    given = inputs(policy)
    given["values"] = values(given["values"])
    with pytest.raises(InvalidInputError) as raised:
        door(policy=policy, **{role: kind(array) for role, array in given.items()})
    assert (raised.value.argument, raised.value.reason) == ("values", reason)
    assert "value_norms" not in str(raised.value)
