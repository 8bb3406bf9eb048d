"""One answer, whichever way it is asked for: in-process, over the wire, sync, async, streamed, narrowed or whole."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from graphkv_client import AsyncCompressClient, CompressClient, LayerSelection, Selection
from graphkv_testing.cases import Case, Spec, seeded
from graphkv_testing.corners import corners
from graphkv_testing.process import Server, serve

import graphkv

SPECS = [*seeded(220), *corners()]
GROUPS = [SPECS[start : start + 12] for start in range(0, len(SPECS), 12)]
CHUNKED = ("keys", "similarity_keys", "attention", "scores", "positions")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[CompressClient]:
    with CompressClient(server.address) as own:
        yield own


def plain(layers: Any) -> list[tuple[object, ...]]:
    """All that must be equal, whatever the kind of array."""
    rows = []
    for layer in sorted(layers, key=lambda own: own.layer):
        indices = [np.asarray(row).tolist() for row in layer.indices]
        rows.append((layer.layer, indices, layer.kept_score_ratio, layer.changed, layer.importance, layer.fingerprint))
    return rows


def in_process(case: Case) -> list[tuple[object, ...]]:
    answer = graphkv.select(**given(case))
    assert isinstance(answer, Selection)
    return plain(answer)


def given(case: Case) -> dict[str, Any]:
    return {name: value for name, value in case.inputs().items() if value is not None}


def as_numpy(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def settings(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name in ("policy", "pinned", "rope")}


def tensors(inputs: dict[str, Any], layer: int) -> dict[str, Any]:
    return {name: value[layer] for name, value in inputs.items() if name not in ("policy", "pinned", "rope")}


def streamed(client: CompressClient, inputs: dict[str, Any]) -> list[LayerSelection]:
    layers = len(inputs["keys"])
    with client.stream(num_layers=layers, **settings(inputs)) as stream:
        for layer in range(layers):
            stream.put(layer, **tensors(inputs, layer))
        return list(stream)


def in_chunks(client: CompressClient, inputs: dict[str, Any], step: int) -> list[LayerSelection]:
    """Token range by token range; the queries come with the one that completes the layer."""
    layers, tokens = len(inputs["keys"]), inputs["keys"][0].shape[1]
    with client.stream(num_layers=layers, num_tokens=tokens, **settings(inputs)) as stream:
        for start in range(0, tokens, step):
            for layer in range(layers):
                own = tensors(inputs, layer)
                part = {name: cut(name, own[name], start, step) for name in CHUNKED if name in own}
                if start + step >= tokens and "queries" in own:
                    part["queries"] = own["queries"]
                stream.put(layer, start=start, **part)
        return list(stream)


def cut(name: str, tensor: Any, start: int, step: int) -> Any:
    axis = {"attention": 2, "positions": tensor.ndim - 1}.get(name, 1)
    return tensor[(slice(None),) * axis + (slice(start, start + step),)]


async def asynchronously(address: str, inputs: dict[str, Any]) -> tuple[Any, Any]:
    layers = len(inputs["keys"])
    async with AsyncCompressClient(address) as client:
        whole = await client.select(**inputs)
        async with client.stream(num_layers=layers, **settings(inputs)) as stream:
            for layer in range(layers):
                await stream.put(layer, **tensors(inputs, layer))
            return whole, [answer async for answer in stream]


@pytest.mark.parametrize("specs", GROUPS, ids=lambda specs: f"{specs[0].id}..{len(specs)}")
def test_every_way_gives_one_answer(specs: list[Spec], server: Server, client: CompressClient) -> None:
    for spec in specs:
        case = Case(spec)
        inputs, wanted = given(case), in_process(case)
        ways = {
            "select": client.select(**inputs),
            "stream": streamed(client, inputs),
            "chunks": in_chunks(client, inputs, step=max(1, spec.tokens // 3)),
        }
        ways["async"], ways["async stream"] = asyncio.run(asynchronously(server.address, inputs))
        if spec.dtype != "bf16":
            ways["numpy"] = client.select(**as_numpy(inputs))
            ways["numpy chunks"] = in_chunks(client, as_numpy(inputs), step=max(1, spec.tokens // 4))
        for way, answer in ways.items():
            assert plain(answer) == wanted, f"{way} differs from graphkv.select for {spec.id}"
    assert server.metric("graphkv_in_flight_bytes") == 0


def test_a_batch_of_prompts(client: CompressClient) -> None:
    torch.manual_seed(3)
    sizes = (301, 33, 97)
    keys = [torch.randn(2, 3, tokens, 16) for tokens in sizes]
    queries = [torch.randn(2, 6, 32, 16) for _ in sizes]
    pinned = [None, [(3, 7)], [(0, 2)]]
    policy = graphkv.Policy(50)
    wanted = graphkv.select(keys, queries=queries, policy=policy, pinned=pinned)
    given = client.select(keys, queries=queries, policy=policy, pinned=pinned)
    assert [plain(answer) for answer in given] == [plain(answer) for answer in wanted]
