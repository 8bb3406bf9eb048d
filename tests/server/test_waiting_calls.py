"""Calls whose layers wait for each other, through a real server: who leaves, stops or is late leaves nothing behind, and no
two of them block each other.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from graphkv_proto import v1 as pb
from graphkv_testing.forms import POLICIES, assert_library, call_of, library
from graphkv_testing.process import Server, serve, wait_until
from graphkv_testing.raw import SELECT, Outcome, assert_good, call

WAITING = pytest.mark.parametrize("name", ["cake", "a model", "pages of a model"])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--max-bytes-in-flight", "1MiB", "--stall-timeout", "5", "--device", "cpu") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(server: Server) -> Iterator[None]:
    yield
    assert server.settled(), server.metrics()
    assert_good(server.address)


@WAITING
def test_who_leaves_after_any_message_is_abandoned(server: Server, name: str) -> None:
    before = server.outcomes().get("abandoned", 0)
    messages = call_of(POLICIES[name], layers=3, window=2).messages()
    with grpc.insecure_channel(server.address) as channel:
        method = channel.stream_stream(SELECT, request_serializer=pb.SelectRequest.SerializeToString)
        for stop in range(1, len(messages)):
            never = threading.Event()

            def upto(stop: int = stop, never: threading.Event = never) -> Iterator[Any]:
                yield from messages[:stop]
                never.wait(30)

            running = method(upto())
            assert wait_until(lambda: server.metric("graphkv_in_flight_requests") == 1)
            if 1 < stop < len(messages) - 1:  # with all layers there it may be answered already, and hold nothing
                assert wait_until(lambda: server.metric("graphkv_in_flight_bytes") > 0)
            running.cancel()
            never.set()
            assert server.settled()
    assert server.outcomes()["abandoned"] == before + len(messages) - 1


@WAITING
def test_a_deadline_that_passes_while_layers_wait(server: Server, name: str) -> None:
    before = server.outcomes().get("EXPIRED", 0)
    messages = call_of(POLICIES[name], layers=3, window=2).messages()
    never = threading.Event()

    def stuck() -> Iterator[Any]:
        yield from messages[:-3]
        never.wait(30)

    got = call(server.address, stuck(), timeout=0.5)
    never.set()
    assert got.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert wait_until(lambda: server.outcomes().get("EXPIRED", 0) == before + 1)


@WAITING
def test_calls_that_each_need_more_than_half_of_the_room_are_all_answered(server: Server, name: str) -> None:
    """All begin at once: were room taken layer by layer, each could hold what the others wait for."""
    sent = [call_of(POLICIES[name], layers=4, window=2, seed=seed) for seed in range(4)]
    begun = threading.Barrier(len(sent))

    def one(number: int) -> Outcome:
        own = sent[number]
        own.header.largest_layer_bytes = own.header.total_bytes = 2**20 // 6
        messages = own.messages()

        def together() -> Iterator[Any]:
            yield messages[0]
            begun.wait(30)
            yield from messages[1:]

        return call(server.address, together())

    with ThreadPoolExecutor(len(sent)) as pool:
        for own, got in zip(sent, pool.map(one, range(len(sent))), strict=True):
            assert_library(got, library(POLICIES[name], own), POLICIES[name])
