"""A call that was lost on the way is sent again, whatever it is about, and its answer is the library's; no layer comes twice."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from graphkv_client import (
    AsyncCompressClient,
    CompressClient,
    InternalError,
    InvalidInputError,
    OverloadedError,
    Policy,
    Reason,
    Selection,
    UnavailableError,
)
from graphkv_testing.every_scorer import LAYERS, policy_of, prompt_for
from graphkv_testing.flaky import flaky
from graphkv_testing.process import Server, serve
from graphkv_testing.shaped import outputs_of, plain

import graphkv
from graphkv.terms.catalogue import SCORERS

RANGED = ("keys", "scores", "values")
SHAPES: dict[str, dict[str, Any]] = {
    "head": {},
    "model": {"granularity": "model", "page_size": 8},
    "cake": {"budget_allocation": "cake", "window": 9},
}
POLICY = Policy(40)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_is_sent_again_in_every_way(scorer: str, shape: str, server: Server) -> None:
    if (scorer, shape) == ("given", "cake"):
        pytest.skip("no such policy")
    tokens = 131
    policy = policy_of(scorer, **SHAPES[shape])
    inputs = prompt_for(scorer, tokens, seed=3, policy=policy)
    settings = {"policy": policy, "outputs": outputs_of(policy, tokens)}
    wanted = plain(graphkv.select(**settings, **inputs))
    for arrays in (inputs, {role: array.numpy() for role, array in inputs.items()}):
        with flaky(server.address, after=[1, None]) as breaks, CompressClient(breaks.address) as client:
            kept = client.select(**settings, **arrays)
            assert plain(kept) == wanted
            assert isinstance(kept, Selection)
            assert (kept.summary.attempts, breaks.sendings) == (3, 3)
        for copied in (False, True):
            with flaky(server.address, after=[1]) as breaks, CompressClient(breaks.address) as client:
                with client.stream(num_layers=LAYERS, num_tokens=tokens, **settings) as stream:
                    for start in range(0, tokens, 50):
                        for layer in range(LAYERS):
                            part = {
                                role: array[layer][:, start : start + 50] for role, array in arrays.items() if role in RANGED
                            }
                            if start + 50 >= tokens:
                                part |= {role: array[layer] for role, array in arrays.items() if role not in RANGED}
                            stream.put(layer, start=start, copy=copied, **part)
                    assert plain(list(stream)) == wanted
                assert (stream.summary.attempts, breaks.sendings) == (2, 2)


def layer_of(prompt: Any, layer: int) -> dict[str, Any]:
    return {role: array[layer] for role, array in prompt.items()}


@pytest.fixture(scope="module")
def prompt() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    return {
        "keys": rng.standard_normal((5, 3, 201, 16), dtype=np.float32),
        "queries": rng.standard_normal((5, 6, 32, 16), dtype=np.float32),
    }


@pytest.mark.parametrize("after", [[0], [1], [3], [5], [1, 3], [4, 1, 2]], ids=str)
def test_answered_layers_are_the_callers_again(server: Server, prompt: dict[str, Any], after: list[int | None]) -> None:
    own = {role: array.copy() for role, array in prompt.items()}
    expected = graphkv.select(**prompt, policy=POLICY)
    assert isinstance(expected, Selection)
    found = []
    with flaky(server.address, after=after) as breaks, CompressClient(breaks.address) as client:
        with client.stream(num_layers=5, policy=POLICY) as stream:
            for layer in range(5):
                stream.put(layer, **layer_of(own, layer))
            for selection in stream:
                found.append(selection.layer)
                np.testing.assert_array_equal(selection.indices, expected.indices[selection.layer])
                for array in own.values():
                    array[selection.layer] = np.nan  # as its owner may: it has its answer
        assert breaks.sendings == len(after) + 1
    assert sorted(found) == list(range(5))


def test_copies_that_had_to_make_room_end_with_the_replica(server: Server, prompt: dict[str, Any]) -> None:
    size = sum(array[0].nbytes for array in prompt.values())
    with (
        flaky(server.address, after=[0]) as breaks,
        CompressClient(breaks.address, max_buffered_bytes=size + size // 2) as client,
        client.stream(num_layers=5, policy=Policy(40, granularity="model")) as stream,
    ):
        for layer in range(5):
            stream.put(layer, **layer_of(prompt, layer), copy=True)
        with pytest.raises(UnavailableError, match="gone"):
            list(stream)
    assert breaks.sendings == 1


def test_a_stream_of_nothing_but_puts_is_not_held_up_by_copies_that_wait_for_an_answer(
    server: Server, prompt: dict[str, Any]
) -> None:
    size = sum(array[0].nbytes for array in prompt.values())
    policy = Policy(40, granularity="model")
    with (
        CompressClient(server.address, max_buffered_bytes=size + size // 2) as client,
        client.stream(num_layers=5, policy=policy) as stream,
    ):
        for layer in range(5):
            stream.put(layer, **layer_of(prompt, layer), copy=True)
        assert plain(list(stream)) == plain(graphkv.select(**prompt, policy=policy))


@pytest.mark.parametrize(
    ("error", "sendings"),
    [
        (UnavailableError("gone"), 4),
        (UnavailableError("going", reason=Reason.DRAINING), 4),
        (UnavailableError("bits", reason=Reason.CHECKSUM), 2),
        (OverloadedError("full", retry_after=0.05), 2),
        (UnavailableError("for good", retryable=False), 1),
        (InvalidInputError("wrong"), 1),
        (InternalError("oops"), 1),
    ],
    ids=lambda each: f"{type(each).__name__}-{each.reason}-{each.retryable}" if isinstance(each, Exception) else None,
)
def test_each_error_is_sent_again_as_often_as_it_may(server: Server, prompt: dict[str, Any], error: Any, sendings: int) -> None:
    async def ask(address: str) -> None:
        async with AsyncCompressClient(address) as client:
            with pytest.raises(type(error)):
                await client.select(**prompt, policy=POLICY)

    with flaky(server.address, after=[0] * 12) as breaks:
        breaks.error = error
        with CompressClient(breaks.address) as client, pytest.raises(type(error)):
            client.select(**prompt, policy=POLICY)
        assert breaks.sendings == sendings
        asyncio.run(ask(breaks.address))
        assert breaks.sendings == 2 * sendings
        with CompressClient(breaks.address) as client, client.stream(num_layers=5, policy=POLICY) as stream:
            for layer in range(5):
                stream.put(layer, **layer_of(prompt, layer))
            with pytest.raises(type(error)):
                list(stream)
        assert breaks.sendings == 3 * sendings


def test_max_attempts_turns_it_off(server: Server, prompt: dict[str, Any]) -> None:
    with flaky(server.address, after=[0]) as breaks, CompressClient(breaks.address, max_attempts=1) as client:
        with pytest.raises(UnavailableError):
            client.select(**prompt, policy=POLICY)
        assert client.select(**prompt, policy=POLICY)
        assert breaks.sendings == 2


def test_an_async_stream_is_sent_again(server: Server, prompt: dict[str, Any]) -> None:
    async def streamed(address: str) -> Any:
        async with AsyncCompressClient(address) as client, client.stream(num_layers=5, policy=POLICY) as stream:
            for layer in range(5):
                await stream.put(layer, **layer_of(prompt, layer))
            found = [selection async for selection in stream]
            assert stream.summary.attempts == 3
            return found

    with flaky(server.address, after=[2, 3]) as breaks:
        assert plain(asyncio.run(streamed(breaks.address))) == plain(graphkv.select(**prompt, policy=POLICY))
