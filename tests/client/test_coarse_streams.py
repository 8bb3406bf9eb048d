"""Streams whose policy needs all layers first: nothing is answered before, everything after, however the layers came."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from graphkv_client import AsyncCompressClient, CompressClient, InvalidInputError, Policy
from graphkv_testing.process import Server, wait_until

import graphkv

TOKENS = 201
WAITING = {
    "model": Policy(50, granularity="model"),
    "model's votes": Policy(50, granularity="model", graph=graphkv.Graph(update="sequential", strength=0.3)),
    "model's pages": Policy(50, granularity="model", page_size=8),
    "cake": Policy(50, budget_allocation="cake"),
    "cake by layer": Policy(50, budget_allocation="cake", granularity="layer", graph=None),
}
OUTPUTS = ["updated_scores", "keep_mask"]
waiting = pytest.mark.parametrize("policy", WAITING.values(), ids=WAITING)
kinds = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])


def layer_of(prompt: dict[str, Any], layer: int) -> dict[str, Any]:
    return {role: array[layer] for role, array in prompt.items()}


def rows(selections: Any) -> dict[tuple[int, int], Any]:
    def plain(array: Any) -> Any:
        return [np.asarray(row).tolist() for row in array] if isinstance(array, list) else np.asarray(array).tolist()

    return {
        (one.prompt, one.layer): (plain(one.indices), {name: plain(array) for name, array in one.outputs.items()})
        for one in selections
    }


@waiting
@kinds
def test_layers_in_any_order(client: CompressClient, prompt: dict[str, Any], policy: Policy, kind: Any) -> None:
    given = {role: kind(array) for role, array in prompt.items()}
    expected = graphkv.select(**given, policy=policy, outputs=OUTPUTS)
    with client.stream(num_layers=2, policy=policy, outputs=OUTPUTS) as stream:
        for layer in (1, 0):
            stream.put(layer, **layer_of(given, layer))
        found = list(stream)
        assert list(stream) == [], "it has ended"
    assert rows(found) == rows(expected)
    assert len(found) == (1 if policy.granularity == "model" else 2)
    assert stream.summary.sent_bytes > 0
    for one in found:
        arrays = [*one.outputs.values(), *(one.indices if isinstance(one.indices, list) else [one.indices])]
        assert {type(array) for array in arrays} == {type(kind(prompt["keys"]))}


@waiting
@kinds
def test_nothing_is_answered_before_the_last_layer_was_put(
    server: Server, client: CompressClient, prompt: dict[str, Any], policy: Policy, kind: Any
) -> None:
    given = {role: kind(array) for role, array in prompt.items()}
    with ThreadPoolExecutor(1) as pool, client.stream(num_layers=2, policy=policy) as stream:
        stream.put(0, **layer_of(given, 0))
        first = pool.submit(next, stream)
        assert wait_until(lambda: server.metric("graphkv_in_flight_bytes") > 0), "the first layer is held"
        assert not first.done()
        stream.put(1, **layer_of(given, 1))
        found = [first.result(30), *stream]
    assert rows(found) == rows(graphkv.select(**given, policy=policy))
    assert server.settled()


@waiting
def test_whoever_puts_is_told_that_layers_are_missing(
    server: Server, client: CompressClient, prompt: Any, policy: Policy
) -> None:
    with client.stream(num_layers=2, policy=policy) as stream:
        stream.put(1, **layer_of(prompt, 1))
        with pytest.raises(InvalidInputError, match="the first is layer 0") as raised:
            next(stream)
        assert raised.value.reason == "INCOMPLETE"
    assert server.settled(), "what was held for the missing layer is free again"


@waiting
def test_a_prompt_of_a_batch_waits_for_its_own_layers_alone(client: CompressClient, prompt: Any, policy: Policy) -> None:
    short = {"keys": prompt["keys"][:, :, :90], "queries": prompt["queries"]}
    expected = rows(graphkv.select(**short, policy=policy))
    with ThreadPoolExecutor(1) as pool, client.stream(num_layers=2, num_tokens=[TOKENS, 90], policy=policy) as stream:
        stream.put(0, prompt=0, **layer_of(prompt, 0))
        for layer in range(2):
            stream.put(layer, prompt=1, **layer_of(short, layer))
        early = [pool.submit(next, stream).result(30) for _ in expected]
        assert {(0, one.layer): rows([one])[1, one.layer] for one in early} == expected
        stream.put(1, prompt=0, **layer_of(prompt, 1))
        assert rows(stream) == rows(graphkv.select(**prompt, policy=policy))


@waiting
def test_asyncio(server: Server, prompt: dict[str, Any], policy: Policy) -> None:
    expected = rows(graphkv.select(**prompt, policy=policy, outputs=OUTPUTS))

    async def both() -> None:
        async with AsyncCompressClient(server.address) as client, asyncio.timeout(60):
            assert rows(await client.select(**prompt, policy=policy, outputs=OUTPUTS)) == expected
            async with client.stream(num_layers=2, policy=policy, outputs=OUTPUTS) as stream:
                await stream.put(1, **layer_of(prompt, 1))
                first = asyncio.create_task(anext(stream))
                await asyncio.sleep(0)
                assert not first.done()
                await stream.put(0, **layer_of(prompt, 0))
                assert rows([await first, *[one async for one in stream]]) == expected

    asyncio.run(both())


def test_copies_of_a_waiting_layer_may_be_changed_at_once(client: CompressClient, prompt: dict[str, Any]) -> None:
    policy, expected = WAITING["cake"], graphkv.select(**prompt, policy=WAITING["cake"])
    own = {role: array.copy() for role, array in prompt.items()}
    with client.stream(num_layers=2, policy=policy) as stream:
        for layer in range(2):
            stream.put(layer, **layer_of(own, layer), copy=True)
            for array in own.values():
                array[layer] = np.nan
        assert rows(stream) == rows(expected)


@waiting
def test_a_number_that_is_not_finite_names_its_layer(client: CompressClient, prompt: dict[str, Any], policy: Policy) -> None:
    wrong = {role: array.copy() for role, array in prompt.items()}
    wrong["queries"][1, 2, 3, 4] = np.nan
    for kind in (np.asarray, torch.from_numpy):
        with pytest.raises(InvalidInputError) as raised:
            client.select(**{role: kind(array) for role, array in wrong.items()}, policy=policy)
        assert (raised.value.argument, raised.value.reason) == ("queries", "NON_FINITE")
        assert "layer 1" in str(raised.value)


@kinds
def test_scores_of_more_than_a_chunk(client: CompressClient, kind: Any) -> None:
    torch.manual_seed(5)
    given = {"keys": torch.randn(2, 3, 90_001, 4).numpy(), "queries": torch.randn(2, 3, 32, 4).numpy()}
    inputs = {role: kind(array) for role, array in given.items()}
    for policy in (Policy(500, granularity="layer", page_size=16), Policy(500, budget_allocation="adaptive_heads")):
        assert rows(client.select(**inputs, policy=policy)) == rows(graphkv.select(**inputs, policy=policy))


def test_left_with_a_model_half_put(server: Server, client: CompressClient, prompt: dict[str, Any]) -> None:
    threads = threading.active_count()
    for policy in WAITING.values():
        with client.stream(num_layers=2, policy=policy) as stream:
            stream.put(0, **layer_of(prompt, 0))
    assert server.settled()
    assert wait_until(lambda: threading.active_count() <= threads)
