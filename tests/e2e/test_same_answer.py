"""One answer, whichever way it is asked for: in-process, over the wire, sync, async, streamed, narrowed or whole.

Of every granularity and budget, and with the outputs that its policy can give.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graphkv_client import AsyncCompressClient, CompressClient, LayerSelection, Selection
from graphkv_testing.cases import Case, Spec, seeded
from graphkv_testing.corners import corners
from graphkv_testing.process import Server, serve
from graphkv_testing.shaped import SHAPES, outputs_of, plain, shaped

import graphkv

SPECS = [*seeded(220), *corners(), *shaped()]
GROUPS = [SPECS[start : start + 12] for start in range(0, len(SPECS), 12)]
SETTINGS = ("policy", "pinned", "rope", "outputs")
CHUNKED = ("keys", "similarity_keys", "attention", "scores", "values", "positions")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[CompressClient]:
    with CompressClient(server.address) as own:
        yield own


def in_process(inputs: dict[str, Any]) -> list[tuple[object, ...]]:
    answer = graphkv.select(**inputs)
    assert isinstance(answer, Selection)
    return plain(answer)


def given(case: Case) -> dict[str, Any]:
    inputs = {**case.inputs(), "outputs": outputs_of(case.policy, case.spec.seed)}
    return {name: value for name, value in inputs.items() if value is not None}


def as_numpy(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def settings(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name in SETTINGS}


def tensors(inputs: dict[str, Any], layer: int) -> dict[str, Any]:
    return {name: value[layer] for name, value in inputs.items() if name not in SETTINGS}


def streamed(client: CompressClient, inputs: dict[str, Any]) -> list[LayerSelection]:
    layers = len(inputs["keys"])
    with client.stream(num_layers=layers, **settings(inputs)) as stream:
        for layer in range(layers):
            stream.put(layer, **tensors(inputs, layer))
        return list(stream)


def in_chunks(client: CompressClient, inputs: dict[str, Any], step: int) -> list[LayerSelection]:
    """Token range by token range; what has no tokens, as the queries, comes with the one that completes the layer."""
    layers, tokens = len(inputs["keys"]), inputs["keys"][0].shape[1]
    with client.stream(num_layers=layers, num_tokens=tokens, **settings(inputs)) as stream:
        for start in range(0, tokens, step):
            for layer in range(layers):
                own = tensors(inputs, layer)
                part = {name: cut(name, own[name], start, step) for name in CHUNKED if name in own}
                if start + step >= tokens:
                    part |= {name: array for name, array in own.items() if name not in CHUNKED}
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
        inputs = given(case)
        wanted = in_process(inputs)
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


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("shape", ["head", *SHAPES])
def test_a_batch_of_prompts(shape: str, kind: str, client: CompressClient) -> None:
    """Of different lengths, one of them kept whole."""
    torch.manual_seed(3)
    sizes = (301, 33, 97)
    keys = [torch.randn(2, 3, tokens, 16) for tokens in sizes]
    queries = [torch.randn(2, 6, 32, 16) for _ in sizes]
    pinned = [None, [(3, 7)], [(0, 2)]]
    policy = graphkv.Policy(50, window=32, **SHAPES.get(shape, {}))
    settings = {"policy": policy, "pinned": pinned, "outputs": outputs_of(policy, 2)}
    wanted = graphkv.select(keys, queries=queries, **settings)
    if kind == "numpy":
        keys, queries = ([own.numpy() for own in arrays] for arrays in (keys, queries))
    given = client.select(keys, queries=queries, **settings)
    assert [plain(answer) for answer in given] == [plain(answer) for answer in wanted]
