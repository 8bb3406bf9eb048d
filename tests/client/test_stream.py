"""LayerStream: layers in while a prefill runs, selections out; and every way it can stop half-way."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from graphkv_client import CompressClient, DeadlineError, InvalidInputError, Policy, UnavailableError
from graphkv_testing.process import Server, wait_until
from graphkv_testing.stand_in import Seen, answer, end_of, stand_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphkv

POLICY = Policy(50)
TOKENS = 201


def layer_of(prompt: dict[str, Any], layer: int) -> dict[str, Any]:
    return {role: array[layer] for role, array in prompt.items()}


def put_and_read(client: CompressClient, prompt: dict[str, Any], *, layers: int = 2) -> list[Any]:
    with client.stream(num_layers=layers, policy=POLICY) as stream:
        for layer in range(layers):
            stream.put(layer, **layer_of(prompt, layer % 2))
        return list(stream)


def rows(selections: Any) -> dict[tuple[int, int], list[list[int]]]:
    return {(one.prompt, one.layer): np.asarray(one.indices).tolist() for one in selections}


def wanted(prompt: dict[str, Any], policy: Policy = POLICY, **settings: Any) -> Any:
    return rows(graphkv.select(**prompt, policy=policy, **settings))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_layers_in_any_order(client: CompressClient, prompt: dict[str, Any], kind: Any) -> None:
    with client.stream(num_layers=2, policy=POLICY) as stream:
        for layer in (1, 0):
            stream.put(layer, **{role: kind(array) for role, array in layer_of(prompt, layer).items()})
        selections = list(stream)
        assert list(stream) == [], "it has ended"
    assert rows(selections) == wanted(prompt)
    assert all(type(one.indices) is type(kind(prompt["keys"])) for one in selections)
    assert stream.summary.transport == "tcp"
    assert stream.summary.sent_bytes > 0


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_in_any_order_is_one_piece(
    client: CompressClient, prompt: dict[str, Any], kind: Any, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, TOKENS - 1), max_size=4)))
    ranges = list(zip([0, *cuts], [*cuts, TOKENS], strict=True))
    puts = data.draw(st.permutations([(layer, start, stop) for layer in range(2) for start, stop in ranges]))
    left = {layer: len(ranges) for layer in range(2)}
    with client.stream(num_layers=2, num_tokens=TOKENS, policy=POLICY) as stream:
        for layer, start, stop in puts:
            left[layer] -= 1
            own = {"keys": kind(prompt["keys"][layer, :, start:stop])}
            if not left[layer]:
                own["queries"] = kind(prompt["queries"][layer])
            stream.put(layer, start=start, **own)
        assert rows(stream) == wanted(prompt)


def test_scores_and_similarity_keys_in_chunks(client: CompressClient, prompt: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    inputs = {
        "keys": prompt["keys"],
        "scores": rng.random((2, 3, TOKENS)),
        "similarity_keys": rng.standard_normal((2, 3, TOKENS, 5), dtype=np.float32),
    }
    policy = Policy.sequential(50)
    for kind in (np.asarray, torch.from_numpy):
        with client.stream(num_layers=2, num_tokens=TOKENS, policy=policy) as stream:
            for layer in range(2):
                for start, stop in ((100, TOKENS), (0, 100)):
                    own = {role: kind(array[layer][:, start:stop]) for role, array in inputs.items()}
                    stream.put(layer, start=start, **own)
            assert rows(stream) == wanted(inputs, policy)


def test_a_batch_says_whose_layer_it_is(client: CompressClient, prompt: dict[str, Any]) -> None:
    short = {"keys": prompt["keys"][:, :, :90], "queries": prompt["queries"]}
    with client.stream(num_layers=2, num_tokens=[TOKENS, 90], pinned=[None, [(3, 9)]], policy=POLICY) as stream:
        for layer in range(2):
            for place, own in ((1, short), (0, prompt)):
                stream.put(layer, prompt=place, **layer_of(own, layer))
        found = rows(stream)
    expected = wanted(prompt)
    expected |= {(1, layer): kept for (_, layer), kept in wanted(short, pinned=[(3, 9)]).items()}
    assert found == expected


def test_answers_come_while_later_layers_go_in(client: CompressClient, prompt: dict[str, Any]) -> None:
    found: list[Any] = []
    first = threading.Event()

    def read(stream: Any) -> None:
        for selection in stream:
            found.append(selection)
            first.set()

    with client.stream(num_layers=2, policy=POLICY) as stream:
        stream.put(0, **layer_of(prompt, 0))
        reader = threading.Thread(target=read, args=(stream,))
        reader.start()
        assert first.wait(20), "the second layer is put only after the first was answered"
        stream.put(1, **layer_of(prompt, 1))
        reader.join(20)
    assert rows(found) == wanted(prompt)


def test_a_copy_frees_the_callers_memory(client: CompressClient, prompt: dict[str, Any]) -> None:
    right = wanted(prompt)
    own = {role: array.copy() for role, array in prompt.items()}
    with client.stream(num_layers=2, policy=POLICY) as stream:
        for layer in range(2):
            stream.put(layer, copy=True, **layer_of(own, layer))
            for array in own.values():
                array[layer] = np.nan
        assert rows(stream) == right


def test_copies_are_bounded(prompt: dict[str, Any]) -> None:
    go, seen = threading.Event(), Seen()

    def slow(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        go.wait(20)
        for message in requests:
            seen.take(message)
        assert seen.header is not None
        for layer in range(seen.header.layers):
            yield answer(seen.header, layer)
        yield end_of(seen.header)

    wide = {"keys": np.zeros((3, 20_011, 64), np.float32), "queries": np.zeros((6, 32, 64), np.float32)}
    layers, bound = 8, 5 * wide["keys"].nbytes // 2
    with (
        stand_in(slow) as address,
        CompressClient(address, max_buffered_bytes=bound) as client,
        client.stream(num_layers=layers, policy=POLICY) as stream,
    ):
        done: list[int] = []

        def put_all() -> None:
            for layer in range(layers):
                stream.put(layer, copy=True, **wide)
                done.append(layer)

        putter = threading.Thread(target=put_all)
        putter.start()
        assert wait_until(lambda: len(done) >= 2)
        assert stream._feed.copied <= bound
        go.set()
        putter.join(60)
        assert len(done) == layers
        assert len(list(stream)) == layers
        assert stream._feed.copied == 0


def test_copies_that_nothing_can_free_raise_instead_of_hanging(server: Server, prompt: dict[str, Any]) -> None:
    with (
        CompressClient(server.address, max_buffered_bytes=30_000) as small,
        small.stream(num_layers=2, num_tokens=TOKENS, policy=POLICY) as stream,
    ):
        stream.put(0, keys=prompt["keys"][0, :, :100], start=0, copy=True)
        with pytest.raises(InvalidInputError) as raised:
            stream.put(0, keys=prompt["keys"][0, :, 100:], start=100, copy=True)
        assert (raised.value.argument, raised.value.reason) == ("max_buffered_bytes", "TOO_LARGE")


def test_an_incomplete_stream_raises_instead_of_hanging(server: Server, client: CompressClient, prompt: dict[str, Any]) -> None:
    with client.stream(num_layers=2, policy=POLICY) as stream:
        stream.put(0, **layer_of(prompt, 0))
        with pytest.raises(InvalidInputError, match="1 of 2 layers were not put; the first is layer 1") as raised:
            next(iter(stream))
        assert raised.value.reason == "INCOMPLETE"
        stream.put(1, **layer_of(prompt, 1))
        assert rows(stream) == wanted(prompt), "it can still be completed"
    with client.stream(num_layers=2, num_tokens=TOKENS, policy=POLICY) as stream:
        stream.put(0, **layer_of(prompt, 0))
        stream.put(1, keys=prompt["keys"][1, :, :5], start=0)
        with pytest.raises(InvalidInputError, match="layer 1, of which 5 of 201 tokens came"):
            list(stream)
    assert server.settled()


def test_a_stream_that_was_left_answers_nothing(server: Server, client: CompressClient, prompt: dict[str, Any]) -> None:
    abandoned = server.outcomes().get("abandoned", 0)
    with client.stream(num_layers=2, policy=POLICY) as stream:
        stream.put(0, **layer_of(prompt, 0))
        assert wait_until(lambda: server.metric("graphkv_in_flight_requests") == 1)
    for use in (lambda: next(stream), lambda: stream.put(1, **layer_of(prompt, 1))):
        with pytest.raises(InvalidInputError, match="closed"):
            use()
    with pytest.raises(InvalidInputError):
        stream.summary  # noqa: B018
    assert server.settled()
    assert server.outcomes()["abandoned"] == abandoned + 1


def test_leaving_by_an_exception_cancels(server: Server, client: CompressClient, prompt: dict[str, Any]) -> None:
    def interrupted() -> None:
        with client.stream(num_layers=2, policy=POLICY) as stream:
            stream.put(0, **layer_of(prompt, 0))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert server.settled()


def test_a_stream_is_a_block(client: CompressClient, prompt: dict[str, Any]) -> None:
    stream = client.stream(num_layers=2, policy=POLICY)
    with pytest.raises(InvalidInputError, match=r"with client\.stream"):
        stream.put(0, **layer_of(prompt, 0))
    with stream:
        pass
    with pytest.raises(InvalidInputError, match="once"), stream:
        pass


def test_a_failure_is_raised_by_the_next_put(prompt: dict[str, Any]) -> None:
    def refuse(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
        yield

    with stand_in(refuse) as address, CompressClient(address) as client:
        with pytest.raises(UnavailableError) as raised:
            put_and_read(client, prompt, layers=10_000)
        assert raised.value.request_id


def test_a_number_that_is_not_finite_is_the_streams_failure(
    server: Server, client: CompressClient, prompt: dict[str, Any]
) -> None:
    for kind in (np.array, torch.tensor):
        own = {role: kind(array) for role, array in prompt.items()}
        own["keys"][1, 0, 7, 0] = np.nan
        with pytest.raises(InvalidInputError) as raised:
            put_and_read(client, own)
        assert (raised.value.argument, raised.value.reason) == ("keys", "NON_FINITE")
        assert raised.value.request_id
    assert server.settled()


def test_the_deadline_covers_the_prefill(server: Server, client: CompressClient, prompt: dict[str, Any]) -> None:
    with client.stream(num_layers=2, policy=POLICY, timeout=0.3) as stream:
        stream.put(0, **layer_of(prompt, 0))
        reader: list[BaseException] = []

        def read() -> None:
            try:
                list(stream)
            except DeadlineError as error:
                reader.append(error)

        thread = threading.Thread(target=read)  # who iterates meanwhile waits no longer either
        thread.start()
        thread.join(20)
        assert len(reader) == 1
    assert server.settled()


def test_no_byte_is_sent_before_the_call_is_right(prompt: dict[str, Any]) -> None:
    seen = Seen()

    def listen(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for message in requests:
            seen.take(message)
        yield from ()

    with stand_in(listen) as address, CompressClient(address) as client:
        with pytest.raises(InvalidInputError) as raised:
            client.select(**prompt, policy=Policy.sequential(50))
        assert raised.value.reason == "ROPE_MISSING"
        with client.stream(num_layers=2, policy=Policy.sequential(50)) as stream:
            with pytest.raises(InvalidInputError) as raised:
                stream.put(0, **layer_of(prompt, 0))
            assert raised.value.reason == "ROPE_MISSING"
    assert seen.messages == 0


def test_a_put_after_the_deadline_is_refused(client: CompressClient, prompt: dict[str, Any]) -> None:
    with client.stream(num_layers=2, num_tokens=TOKENS, policy=POLICY, timeout=0.05) as stream:
        time.sleep(0.1)
        with pytest.raises(DeadlineError, match="2 of 2 layers were not put"):
            stream.put(0, keys=prompt["keys"][0, :, :5], start=0)


def test_closing_the_client_ends_its_streams(server: Server, prompt: dict[str, Any]) -> None:
    own = CompressClient(server.address)
    with own.stream(num_layers=2, policy=POLICY) as opened, own.stream(num_layers=2, policy=POLICY) as waiting:
        opened.put(0, **layer_of(prompt, 0))
        own.close()
        assert wait_until(lambda: opened._failure is not None)
        for stream in (opened, waiting):
            for layer in (1, 0):
                with pytest.raises(InvalidInputError, match="the client is closed") as raised:
                    stream.put(layer, **layer_of(prompt, layer))
                assert (raised.value.reason, raised.value.retryable) == ("CLOSED", False)
            with pytest.raises(InvalidInputError, match="the client is closed"):
                next(stream)
    assert server.settled()


def test_closing_the_client_ends_a_select(prompt: dict[str, Any]) -> None:
    arrived, go = threading.Event(), threading.Event()

    def hang(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        arrived.set()
        go.wait(20)
        yield from ()

    with stand_in(hang) as address, CompressClient(address) as own, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(own.select, **prompt, policy=POLICY)
        assert arrived.wait(20)
        own.close()
        with pytest.raises(InvalidInputError, match="the client is closed"):
            waiting.result(20)
        go.set()
