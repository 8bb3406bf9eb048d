"""Callers see nothing of replicas that die, freeze, drain or refuse: real processes, every answer equal to the library's."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from graphkv_client import (
    AsyncCompressClient,
    CompressClient,
    OverloadedError,
    Policy,
    Selection,
)
from graphkv_testing.fleet import Fleet, fleet
from graphkv_testing.process import wait_until

import graphkv

POLICY = Policy(budget=40)


def prompt_of(seed: int, tokens: int = 131) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "keys": rng.standard_normal((2, 3, tokens, 16), dtype=np.float32),
        "queries": rng.standard_normal((2, 6, 32, 16), dtype=np.float32),
    }


PROMPTS = [prompt_of(seed) for seed in range(4)]
EXPECTED = [graphkv.select(**prompt, policy=POLICY) for prompt in PROMPTS]


def check(selection: Any, expected: Any) -> None:
    assert isinstance(selection, Selection)
    for own, other in zip(selection.indices, expected.indices, strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.fixture(scope="module")
def three() -> Iterator[Fleet]:
    with fleet(3) as running:
        yield running


class Callers:
    """Threads that call one client again and again until told to stop."""

    def __init__(self, client: CompressClient, threads: int) -> None:
        self._client = client
        self._stop = threading.Event()
        self.errors: list[BaseException] = []
        self.where: Counter[str] = Counter()
        self.attempts = 0
        self.calls = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            place = (number + self.calls) % len(PROMPTS)
            try:
                kept = self._client.select(**PROMPTS[place], policy=POLICY)
                check(kept, EXPECTED[place])
            except BaseException as error:  # noqa: BLE001  # the test raises it
                self.errors.append(error)
                return
            assert isinstance(kept, Selection)
            with self._lock:
                self.calls += 1
                self.attempts += kept.summary.attempts
                self.where[kept.summary.where] += 1

    def more(self, count: int) -> None:
        """Waits until so many more calls were answered."""
        aim = self.calls + count
        assert wait_until(lambda: self.calls >= aim or self.errors, 60)
        if self.errors:
            raise self.errors[0]

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


@contextmanager
def calling(client: CompressClient, threads: int = 4) -> Iterator[Callers]:
    callers = Callers(client, threads)
    try:
        yield callers
    finally:
        callers.stop()
    assert not callers.errors, callers.errors


def test_calls_are_spread_over_all_replicas_through_any_address(three: Fleet) -> None:
    for member in three.members[:2]:
        with CompressClient(member.address) as client, calling(client) as callers:
            callers.more(60)
            callers.stop()
            assert set(callers.where) == {three.name(each) for each in three.members}
            assert callers.attempts == callers.calls


def test_without_locate_the_address_is_the_replica(three: Fleet) -> None:
    member = three.members[0]
    with CompressClient(member.address, locate=False) as client:
        for _ in range(5):
            kept = client.select(**PROMPTS[0], policy=POLICY)
            assert isinstance(kept, Selection)
            assert kept.summary.where == three.name(member)


def test_both_clients_and_both_ways_through_locate(three: Fleet) -> None:
    async def spread(address: str) -> Counter[str]:
        where: Counter[str] = Counter()

        async def one(client: AsyncCompressClient, place: int) -> None:
            kept = await client.select(**PROMPTS[place % 4], policy=POLICY)
            check(kept, EXPECTED[place % 4])
            assert isinstance(kept, Selection)
            where[kept.summary.where] += 1

        async with AsyncCompressClient(address) as client:
            for _ in range(5):
                await asyncio.gather(*(one(client, place) for place in range(8)))
        return where

    assert len(asyncio.run(spread(three.members[0].address))) == 3


@pytest.mark.timeout(180)
def test_killed_replicas_are_not_noticed() -> None:
    with fleet(3) as own, CompressClient(own.members[0].address) as client, calling(client) as callers:
        callers.more(20)
        for victim in list(own.members)[:2]:  # the given address dies first
            own.kill(victim)
            callers.more(40)
            own.unlist(victim)
            name = own.name(own.start())
            assert wait_until(lambda name=name: callers.where[name] > 0), "who joins gets calls"
        callers.stop()
        assert callers.attempts > callers.calls


def test_a_stream_goes_on_elsewhere_and_answers_no_layer_twice() -> None:
    layers, tokens = 6, 400
    rng = np.random.default_rng(5)
    keys = rng.standard_normal((layers, 2, tokens, 64), dtype=np.float32)
    queries = rng.standard_normal((layers, 4, 32, 64), dtype=np.float32)
    expected = graphkv.select(keys, queries=queries, policy=POLICY)
    assert isinstance(expected, Selection)
    for copied in (False, True):
        with (
            fleet(2) as own,
            CompressClient(own.members[0].address) as client,
            client.stream(num_layers=layers, policy=POLICY, num_tokens=tokens) as stream,
        ):
            answered = []
            for layer in range(2):
                stream.put(layer, keys=keys[layer], queries=queries[layer], copy=copied)
                answered.append(_next_of(stream))
            stream.put(2, keys=keys[2][:, :100], start=0, copy=copied)
            assert wait_until(lambda own=own: any(_in_flight(each) for each in own.members))
            (victim,) = [each for each in own.members if _in_flight(each)]
            own.kill(victim)
            stream.put(2, keys=keys[2][:, 100:], queries=queries[2], start=100, copy=copied)
            for layer in range(3, layers):
                stream.put(layer, keys=keys[layer], queries=queries[layer], copy=copied)
            answered += list(stream)
            assert sorted(each.layer for each in answered) == list(range(layers))
            for each in answered:
                np.testing.assert_array_equal(each.indices, expected.indices[each.layer])
            assert stream.summary.attempts == 2
            (survivor,) = [each for each in own.members if each is not victim]
            assert stream.summary.where == own.name(survivor)


def test_an_async_stream_goes_on_elsewhere() -> None:
    async def streamed() -> None:
        with fleet(2) as own:
            async with (
                AsyncCompressClient(own.members[0].address) as client,
                client.stream(num_layers=2, policy=POLICY, num_tokens=131) as stream,
            ):
                await stream.put(0, keys=PROMPTS[0]["keys"][0], queries=PROMPTS[0]["queries"][0])
                first = await asyncio.wait_for(_anext_of(stream), 20)
                (victim,) = [each for each in own.members if _in_flight(each)]
                own.kill(victim)
                await stream.put(1, keys=PROMPTS[0]["keys"][1], queries=PROMPTS[0]["queries"][1])
                rest = [each async for each in stream]
                assert [first.layer, *(each.layer for each in rest)] == [0, 1]
                np.testing.assert_array_equal(rest[0].indices, EXPECTED[0].indices[1])  # type: ignore[union-attr]
                assert stream.summary.attempts == 2

    asyncio.run(streamed())


@pytest.mark.timeout(180)
def test_a_frozen_replica_costs_one_attempt_timeout_is_left_alone_and_comes_back() -> None:
    with fleet(3) as own, CompressClient(own.members[1].address, attempt_timeout=2.0) as client, calling(client) as callers:
        callers.more(20)
        frozen = own.members[0]
        name = own.name(frozen)
        own.freeze(frozen)
        callers.more(100)
        before, extra = callers.where[name], callers.attempts - callers.calls
        assert 1 <= extra <= 4, "each caller was held up once at most"
        callers.more(200)  # it is still listed
        assert callers.where[name] == before
        assert callers.attempts - callers.calls == extra, "no call went there again"
        own.thaw(frozen)
        assert wait_until(lambda: callers.where[name] > before, 60)
        assert not callers.errors


def test_a_draining_replica_is_left_at_once() -> None:
    with fleet(2) as own, CompressClient(own.members[0].address) as client, calling(client) as callers:
        callers.more(20)
        own.members[0].terminate()
        callers.more(40)
        assert own.members[0].wait() == 0
        name = own.name(own.start())
        assert wait_until(lambda: callers.where[name] > 0)
        own.members[1].terminate()
        callers.more(40)
        assert own.members[1].wait() == 0


@pytest.mark.timeout(300)
def test_a_thousand_refused_calls_make_at_most_1100_attempts_and_then_all_is_well() -> None:
    with fleet(2, "--max-requests-in-flight", "1") as own:
        with Overloaded(own) as full:
            before = own.attempts()
            refused = _refused(own, calls=1000, threads=8)
            attempts = own.attempts() - before
            assert refused == 1000
            assert 1000 <= attempts <= 1100, attempts
            full.free()
        with CompressClient(own.members[0].address) as client:
            started = time.monotonic()
            kept = None
            while kept is None and time.monotonic() - started < 5.0:
                try:
                    kept = client.select(**PROMPTS[0], policy=POLICY)
                except OverloadedError:
                    continue
            assert kept is not None, "no answer within 5 seconds of the end of the overload"


class Overloaded:
    """Every replica of the fleet is busy with a call that does not go on."""

    def __init__(self, own: Fleet) -> None:
        self._own = own
        self._streams: list[Any] = []
        self._clients: list[CompressClient] = []

    def __enter__(self) -> "Overloaded":
        for member in self._own.members:
            client = CompressClient(member.address, locate=False, timeout=280)
            stream = client.stream(num_layers=2, policy=POLICY)
            stream.__enter__()
            stream.put(0, keys=PROMPTS[0]["keys"][0], queries=PROMPTS[0]["queries"][0])
            assert wait_until(lambda member=member: _in_flight(member))
            self._streams.append(stream)
            self._clients.append(client)
        return self

    def free(self) -> None:
        for stream in self._streams:
            stream.close()
        self._streams = []

    def __exit__(self, *raised: object) -> None:
        self.free()
        for client in self._clients:
            client.close()


def _refused(own: Fleet, *, calls: int, threads: int) -> int:
    """Calls that were refused at last."""
    with CompressClient(own.members[0].address) as client, ThreadPoolExecutor(threads) as pool:

        def one(number: int) -> int:
            try:
                client.select(**PROMPTS[number % 4], policy=POLICY)
            except OverloadedError:
                return 1
            return 0

        return sum(pool.map(one, range(calls)))


def _in_flight(member: Any) -> bool:
    return member.process.poll() is None and member.metric("graphkv_in_flight_requests") > 0


def _next_of(stream: Any) -> Any:
    """The next selection, read on a thread: the stream is not complete."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(next, stream).result(20)


async def _anext_of(stream: Any) -> Any:
    return await asyncio.create_task(anext(stream))


def test_streams_leave_a_frozen_replica_too() -> None:
    with fleet(2) as own:

        def victim() -> Any:
            (found,) = [each for each in own.members if _in_flight(each)]
            own.freeze(found)
            return found

        with CompressClient(own.members[0].address, attempt_timeout=1.5) as client:
            with client.stream(num_layers=2, policy=POLICY) as stream:
                stream.put(0, keys=PROMPTS[0]["keys"][0], queries=PROMPTS[0]["queries"][0])
                _next_of(stream)
                frozen = victim()
                stream.put(1, keys=PROMPTS[0]["keys"][1], queries=PROMPTS[0]["queries"][1])
                (last,) = list(stream)
                np.testing.assert_array_equal(last.indices, EXPECTED[0].indices[1])  # type: ignore[union-attr]
                assert stream.summary.attempts == 2
            own.thaw(frozen)
            assert frozen.settled()

        async def streamed() -> None:
            async with (
                AsyncCompressClient(own.members[0].address, attempt_timeout=1.5) as client,
                client.stream(num_layers=2, policy=POLICY) as stream,
            ):
                await stream.put(0, keys=PROMPTS[0]["keys"][0], queries=PROMPTS[0]["queries"][0])
                await asyncio.wait_for(_anext_of(stream), 20)
                frozen = victim()
                await stream.put(1, keys=PROMPTS[0]["keys"][1], queries=PROMPTS[0]["queries"][1])
                assert [each.layer async for each in stream] == [1]
                assert stream.summary.attempts == 2
                own.thaw(frozen)
                # calls of their own, meanwhile: the other one answers
                frozen = own.members[1]
                own.freeze(frozen)
                for _ in range(6):
                    check(await client.select(**PROMPTS[1], policy=POLICY), EXPECTED[1])
                own.thaw(frozen)

        asyncio.run(streamed())
