"""Tensors on a GPU: scored there, read only when the caller's stream is done with them, answered there. Needs CUDA."""

import asyncio
from typing import Any

import pytest
import torch
from graphkv_client import AsyncCompressClient, CompressClient, Graph, Policy
from graphkv_testing.process import Server

import graphkv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BASE = Policy(50, graph=None)
TOKENS, LAYERS = 4001, 3


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "keys": torch.randn(LAYERS, 4, TOKENS, 64, device="cuda", dtype=torch.bfloat16),
        "queries": torch.randn(LAYERS, 8, 32, 64, device="cuda", dtype=torch.bfloat16),
    }


def same(given: Any, wanted: Any) -> None:
    for one, other in zip(given, wanted, strict=True):
        assert one.indices.device.type == "cuda"
        assert torch.equal(one.indices, other.indices)


def test_the_answer_is_on_the_device(client: CompressClient, inputs: dict[str, torch.Tensor]) -> None:
    same(client.select(**inputs, policy=BASE), graphkv.select(**inputs, policy=BASE))
    first_heads = {role: tensor.transpose(1, 2).contiguous() for role, tensor in inputs.items()}
    same(client.select(**first_heads, policy=BASE, layout="NHD"), graphkv.select(**inputs, policy=BASE))


def test_only_candidates_leave_the_device(client: CompressClient, inputs: dict[str, torch.Tensor]) -> None:
    sent = client.select(**inputs, policy=Policy(50)).summary.sent_bytes  # type: ignore[union-attr]
    assert sent == LAYERS * 4 * (200 * (4 + 4 + 64 * 2) + 3 * 8)
    whole = client.select(**inputs, policy=Policy(50, graph=Graph(candidates=None)))
    assert whole.summary.sent_bytes == inputs["keys"].nbytes + LAYERS * 4 * TOKENS * 4  # type: ignore[union-attr]


@pytest.mark.parametrize("copy", [False, True], ids=["the caller's memory", "copies"])
@pytest.mark.parametrize("parts", [1, 3], ids=["whole layers", "chunks"])
def test_what_the_stream_still_computes_is_waited_for(
    client: CompressClient, inputs: dict[str, torch.Tensor], copy: bool, parts: int
) -> None:
    wanted = graphkv.select(**inputs, policy=BASE)
    side = torch.cuda.Stream()
    late = {role: torch.full_like(tensor, torch.nan) for role, tensor in inputs.items()}
    torch.cuda.synchronize()
    step = -(-TOKENS // parts)
    with client.stream(num_layers=LAYERS, num_tokens=TOKENS, policy=BASE) as stream:
        for layer in range(LAYERS):
            for start in range(0, TOKENS, step):
                with torch.cuda.stream(side):
                    torch.cuda._sleep(50_000_000)  # tens of milliseconds, in which put has long returned
                    late["keys"][layer, :, start : start + step].copy_(inputs["keys"][layer, :, start : start + step])
                    late["queries"][layer].copy_(inputs["queries"][layer])
                    last = {"queries": late["queries"][layer]} if start + step >= TOKENS else {}
                    keys = late["keys"][layer, :, start : start + step]
                    stream.put(layer, keys=keys, start=start, copy=copy, **last)
                    if copy:
                        keys.fill_(torch.nan)
        same(sorted(stream, key=lambda one: one.layer), wanted)


def test_a_shared_answer_and_its_outputs_are_on_the_device(client: CompressClient, inputs: dict[str, torch.Tensor]) -> None:
    policy, outputs = Policy(50, graph=None, granularity="layer"), ["updated_scores", "keep_mask", "moves"]
    given = client.select(**inputs, policy=policy, outputs=outputs)
    wanted = graphkv.select(**inputs, policy=policy, outputs=outputs)
    same(given, wanted)
    assert given.summary.sent_bytes == LAYERS * 4 * TOKENS * 4, "the scores alone"  # type: ignore[union-attr]
    for one, other in zip(given, wanted, strict=True):
        assert one.indices.shape == (50,)  # type: ignore[union-attr]
        for name, output in one.outputs.items():  # type: ignore[union-attr]
            assert output.device.type == "cuda"
            assert torch.equal(output, other.outputs[name])  # type: ignore[union-attr]


def test_what_a_cake_budget_reads_leaves_the_device_whole(client: CompressClient, inputs: dict[str, torch.Tensor]) -> None:
    policy = Policy(50, budget_allocation="cake")
    given = client.select(**inputs, policy=policy)
    wanted = graphkv.select(**{role: tensor.cpu() for role, tensor in inputs.items()}, policy=policy)
    for one, other in zip(given, wanted, strict=True):
        assert one.indices.device.type == "cuda"  # type: ignore[union-attr]
        assert torch.equal(one.indices.cpu(), other.indices)  # type: ignore[union-attr]
    assert given.summary.sent_bytes == sum(tensor.nbytes for tensor in inputs.values())  # type: ignore[union-attr]


def test_asyncio(server: Server, inputs: dict[str, torch.Tensor]) -> None:
    async def streamed() -> Any:
        async with (
            AsyncCompressClient(server.address) as client,
            client.stream(num_layers=LAYERS, policy=BASE) as stream,
        ):
            for layer in range(LAYERS):
                await stream.put(layer, keys=inputs["keys"][layer], queries=inputs["queries"][layer])
            return sorted([one async for one in stream], key=lambda one: one.layer)

    same(asyncio.run(streamed()), graphkv.select(**inputs, policy=BASE))
