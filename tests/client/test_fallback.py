"""Where the service does not answer: the same choice here, everything kept, or the error; visible in the answer and counted."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from graphkv_client import (
    AsyncCompressClient,
    CompressClient,
    DeadlineError,
    InvalidInputError,
    OverloadedError,
    Policy,
    Selection,
    UnavailableError,
)
from graphkv_client.metrics import ClientMetrics
from graphkv_testing.every_scorer import LAYERS, policy_of, prompt_for
from graphkv_testing.flaky import flaky
from graphkv_testing.process import Server
from graphkv_testing.shaped import SHAPES, outputs_of, plain
from graphkv_testing.stand_in import Seen, stand_in
from prometheus_client import CollectorRegistry

import graphkv
from graphkv.terms.catalogue import SCORERS

NOBODY = "127.0.0.1:9"
POLICY = Policy(40)
kinds = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])


def client_of(address: str = NOBODY, choice: str = "local", **options: Any) -> CompressClient:
    return CompressClient(address, on_unavailable=choice, max_attempts=1, **options)


def layer_of(prompt: Any, layer: int) -> dict[str, Any]:
    return {role: array[layer] for role, array in prompt.items()}


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_choice_made_here_is_the_librarys(scorer: str) -> None:
    policy = policy_of(scorer)
    inputs = prompt_for(scorer, policy=policy)
    settings = {"policy": policy, "outputs": outputs_of(policy, 131)}
    wanted = plain(graphkv.select(**settings, **inputs))
    with client_of() as client:
        for arrays in (inputs, {role: array.numpy() for role, array in inputs.items()}):
            kept = client.select(**settings, **arrays)
            assert isinstance(kept, Selection)
            assert plain(kept) == wanted
            assert (kept.summary.where, kept.summary.transport, kept.summary.attempts) == ("local", "in_process", 1)
            with client.stream(num_layers=LAYERS, **settings) as stream:
                for layer in (1, 0):
                    stream.put(layer, **layer_of(arrays, layer), copy=True)
                assert plain(sorted(stream, key=lambda one: one.layer)) == wanted
            assert stream.summary.where == "local"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_answer_is_made_here_and_kept_whole(shape: str) -> None:
    fields = dict(SHAPES[shape])
    if "options" in fields:
        fields["options"] = dict(fields["options"])
    policy = policy_of(fields.pop("scorer", "snapkv"), window=9, **fields)
    inputs = prompt_for(policy.scorer, policy=policy)
    settings = {"policy": policy, "outputs": outputs_of(policy, 131)}
    with client_of() as client:
        assert plain(client.select(**settings, **inputs)) == plain(graphkv.select(**settings, **inputs))
    whole_policy = Policy.from_dict({**policy.to_dict(), "budget": 131})
    whole = graphkv.select(policy=whole_policy, outputs=settings["outputs"], **inputs)
    with client_of(choice="keep_all") as client:
        kept = client.select(**settings, **inputs)
        assert isinstance(kept, Selection)
        assert isinstance(whole, Selection)
        assert kept.summary.where == "kept_all"
        assert len(kept) == len(whole)
        for one, other in zip(kept, whole, strict=True):
            assert plain_of(one.indices) == plain_of(other.indices)
            assert (one.layer, one.prompt, one.num_tokens, one.changed, one.exact) == (other.layer, 0, 131, 0, True)
            assert (one.granularity, one.page_size, one.importance) == (other.granularity, other.page_size, other.importance)
            assert one.kept_score_ratio == 1.0
            assert set(one.outputs) == set(other.outputs)
            for name, array in one.outputs.items():
                assert array.dtype == other.outputs[name].dtype
                assert plain_of(array) == plain_of(other.outputs[name]), name
        kept.check(num_tokens=131, policy=policy)
        assert kept.layers[0].dropped()[0] == []


def plain_of(array: Any) -> Any:
    return [np.asarray(row).tolist() for row in array] if isinstance(array, list) else np.asarray(array).tolist()


@kinds
def test_everything_is_kept_in_the_callers_kind(prompt: dict[str, Any], kind: Any) -> None:
    given = {role: kind(array) for role, array in prompt.items()}
    with client_of(choice="keep_all") as client:
        kept = client.select(**given, policy=POLICY)
        batch = client.select([given["keys"], given["keys"][:, :, :50]], queries=[given["queries"]] * 2, policy=POLICY)
    assert isinstance(kept, Selection)
    assert isinstance(batch, list)
    for indices in kept.indices:
        assert type(indices) is type(given["keys"])
        assert plain_of(indices) == [list(range(201))] * 3
    assert [(one.num_tokens, one.layers[0].prompt) for one in batch] == [(201, 0), (50, 1)]


def test_a_batch_is_chosen_here(prompt: dict[str, Any]) -> None:
    given = {
        "keys": [prompt["keys"], prompt["keys"][:, :, :150]],
        "queries": [prompt["queries"]] * 2,
        "pinned": [[(3, 9)], None],
    }
    with client_of() as client:
        found, wanted = client.select(**given, policy=POLICY), graphkv.select(**given, policy=POLICY)
    assert isinstance(found, list)
    assert isinstance(wanted, list)
    assert [plain(one) for one in found] == [plain(one) for one in wanted]


@pytest.mark.parametrize("choice", ["local", "keep_all"])
@kinds
def test_a_stream_that_breaks_off_is_finished_here(server: Server, prompt: dict[str, Any], choice: str, kind: Any) -> None:
    given = {role: kind(array) for role, array in prompt.items()}
    wanted = graphkv.select(**given, policy=POLICY)
    assert isinstance(wanted, Selection)
    with flaky(server.address, after=[1]) as breaks, client_of(breaks.address, choice) as client:
        with client.stream(num_layers=2, policy=POLICY, num_tokens=201) as stream:
            stream.put(0, **layer_of(given, 0))
            stream.put(1, keys=given["keys"][1, :, :100], start=0)
            stream.put(1, keys=given["keys"][1, :, 100:], queries=given["queries"][1], start=100)
            first, second = list(stream)
        assert plain_of(first.indices) == plain_of(wanted.indices[first.layer]), "the service's own"
        assert type(second.indices) is type(given["keys"])
        if choice == "local":
            assert plain_of(second.indices) == plain_of(wanted.indices[second.layer])
        else:
            assert plain_of(second.indices) == [list(range(201))] * 3
        assert stream.summary.where == {"local": "local", "keep_all": "kept_all"}[choice]
        assert breaks.sendings == 1


def test_copies_that_had_to_make_room_leave_only_keeping_everything(server: Server, prompt: dict[str, Any]) -> None:
    size = sum(array[0].nbytes for array in prompt.values())
    for choice in ("local", "keep_all"):
        with (
            flaky(server.address, after=[0]) as breaks,
            client_of(breaks.address, choice, max_buffered_bytes=size + size // 2) as client,
            client.stream(num_layers=2, policy=Policy(40, granularity="model")) as stream,
        ):
            for layer in range(2):
                stream.put(layer, **layer_of(prompt, layer), copy=True)
            if choice == "local":
                with pytest.raises(UnavailableError):
                    list(stream)
            else:
                assert [plain_of(one.indices) for one in stream] == [list(range(201))]


def test_the_async_client_falls_back_too(server: Server, prompt: dict[str, Any]) -> None:
    wanted = plain(graphkv.select(**prompt, policy=POLICY))

    async def ask(address: str) -> None:
        async with AsyncCompressClient(address, on_unavailable="local", max_attempts=1) as client:
            kept = await client.select(**prompt, policy=POLICY)
            assert isinstance(kept, Selection)
            assert plain(kept) == wanted
            assert kept.summary.where == "local"
        async with AsyncCompressClient(address, on_unavailable="keep_all", max_attempts=1) as client:
            async with client.stream(num_layers=2, policy=POLICY) as stream:
                for layer in range(2):
                    await stream.put(layer, **layer_of(prompt, layer))
                found = [one async for one in stream]
            assert [len(one.indices[0]) for one in found] == [201, 201]
            assert stream.summary.where == "kept_all"

    asyncio.run(ask(NOBODY))
    with flaky(server.address, after=[0, 0]) as breaks:
        asyncio.run(ask(breaks.address))


@pytest.mark.parametrize(
    "error",
    [UnavailableError("gone"), OverloadedError("full", retry_after=9.0), DeadlineError("late")],
    ids=lambda e: type(e).__name__,
)
def test_what_a_fallback_answers_for(server: Server, prompt: dict[str, Any], error: Any) -> None:
    with flaky(server.address, after=[0] * 2) as breaks:
        breaks.error = error
        with client_of(breaks.address, "keep_all") as client:
            kept = client.select(**prompt, policy=POLICY)
        assert isinstance(kept, Selection)
        assert kept.summary.where == "kept_all"
        with client_of(breaks.address, "raise") as client, pytest.raises(type(error)):
            client.select(**prompt, policy=POLICY)


def test_the_callers_mistakes_are_raised(server: Server, prompt: dict[str, Any]) -> None:
    wrong = {**prompt, "keys": prompt["keys"].copy()}
    wrong["keys"][1, 0, 7, 3] = np.nan
    for choice in ("local", "keep_all"):
        with client_of(server.address, choice) as client:
            with pytest.raises(InvalidInputError) as raised:
                client.select(**wrong, policy=POLICY)
            assert raised.value.reason == "NON_FINITE"
            client.close()
            with pytest.raises(InvalidInputError, match="closed"):
                client.select(**prompt, policy=POLICY)


@pytest.mark.parametrize("granularity", ["head", "layer", "model"])
def test_a_layer_that_is_wrong_is_named_and_never_left_out_of_a_shared_answer(prompt: dict[str, Any], granularity: str) -> None:
    wrong = {role: array.copy() for role, array in prompt.items()}
    wrong["keys"][1, 0, 7, 3] = np.nan
    with client_of() as client, pytest.raises(InvalidInputError, match="layer 1") as caught:
        client.select(policy=Policy(40, granularity=granularity), **wrong)
    assert caught.value.reason == "NON_FINITE"


def test_a_call_that_is_too_late_is_answered_here(prompt: dict[str, Any]) -> None:
    def silent(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        seen = Seen()
        for message in requests:
            seen.take(message)
        time.sleep(2)
        yield from ()

    with stand_in(silent) as address, client_of(address, "keep_all", timeout=0.5) as client:
        kept = client.select(**prompt, policy=POLICY)
        assert isinstance(kept, Selection)
        assert kept.summary.where == "kept_all"
        with client.stream(num_layers=2, policy=POLICY) as stream:
            for layer in range(2):
                stream.put(layer, **layer_of(prompt, layer))
            assert [len(one.indices[0]) for one in stream] == [201, 201]


def test_a_service_that_was_not_there_is_not_asked_again_and_again(prompt: dict[str, Any]) -> None:
    registry = CollectorRegistry()
    with CompressClient(NOBODY, on_unavailable="keep_all", metrics=ClientMetrics(registry)) as client:
        attempts = []
        for _ in range(20):
            kept = client.select(**prompt, policy=POLICY)
            assert isinstance(kept, Selection)
            attempts.append(kept.summary.attempts)
        assert attempts[0] >= 1
        assert attempts[-10:] == [0] * 10, "the breaker is open, and probes are not calls"
    asked = registry.get_sample_value("graphkv_client_attempts_total", {"outcome": "NO_REPLICA"})
    assert asked == sum(attempts)
    assert registry.get_sample_value("graphkv_client_fallbacks_total", {"choice": "keep_all"}) == 20


def test_attempts_are_counted_by_outcome(server: Server, prompt: dict[str, Any]) -> None:
    registry = CollectorRegistry()
    metrics = ClientMetrics(registry)
    with flaky(server.address, after=[0]) as breaks:
        for _ in range(2):  # several clients may share one
            with CompressClient(breaks.address, metrics=metrics) as client:
                client.select(**prompt, policy=POLICY)
    metrics.attempted("SOMETHING_NEWER")
    counts = {
        name: registry.get_sample_value("graphkv_client_attempts_total", {"outcome": name})
        for name in ("ok", "NO_REPLICA", "other")
    }
    assert counts == {"ok": 2, "NO_REPLICA": 1, "other": 1}


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"on_unavailable": "pray"}, "on_unavailable"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"max_attempts": 1.5}, "max_attempts"),
        ({"attempt_timeout": 0}, "attempt_timeout"),
        ({"attempt_timeout": float("inf")}, "attempt_timeout"),
        ({"locate": "yes"}, "locate"),
        ({"metrics": object()}, "metrics"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], argument: str) -> None:
    for kind in (CompressClient, AsyncCompressClient):
        with pytest.raises(InvalidInputError) as raised:
            kind(NOBODY, **options)
        assert raised.value.argument == argument


def test_choosing_here_without_torch_is_refused_at_construction() -> None:
    program = """
import sys
from importlib.abc import MetaPathFinder
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
import graphkv_client
try:
    graphkv_client.CompressClient("127.0.0.1:9", on_unavailable="local")
except graphkv_client.InvalidInputError as error:
    assert error.argument == "on_unavailable" and "graphkv[torch]" in str(error), error
    graphkv_client.CompressClient("127.0.0.1:9", on_unavailable="keep_all").close()
    assert "torch" not in sys.modules
    print("refused")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert run.stdout == "refused\n", run.stderr
