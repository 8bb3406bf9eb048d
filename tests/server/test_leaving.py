"""Callers who leave, stop or run out of time in mid-call: counted for what they are, and nothing of theirs stays."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from graphkv_proto import v1 as pb
from graphkv_testing.process import Server, serve, wait_until
from graphkv_testing.raw import SELECT, RawCall, assert_good, call


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--max-bytes-in-flight", "16MiB", "--stall-timeout", "5", "--device", "cpu") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        running: Server = request.getfixturevalue("server")
        assert running.settled(), running.metrics()


@pytest.mark.parametrize("timeout", [0.0, 0.3], ids=["passed already", "passes in mid-upload"])
def test_a_deadline(server: Server, timeout: float) -> None:
    sent = RawCall(seed=6).messages()
    never = threading.Event()

    def stuck() -> Iterator[Any]:
        yield from sent[:3]
        never.wait(30)

    got = call(server.address, stuck(), timeout=timeout)
    never.set()
    assert got.code == grpc.StatusCode.DEADLINE_EXCEEDED
    if timeout:
        assert wait_until(lambda: server.outcomes().get("EXPIRED", 0) >= 1), server.outcomes()
    assert_good(server.address)


def test_a_caller_who_stops_sending_is_ended(server: Server) -> None:
    never = threading.Event()

    def stuck() -> Iterator[Any]:
        yield from RawCall(seed=6).messages()[:3]
        never.wait(60)

    got = call(server.address, stuck())
    never.set()
    assert (got.code, got.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "SLOW_CLIENT")


UPLOADER = """
import sys, time, grpc
from graphkv_testing.raw import SELECT, RawCall
from graphkv_proto import v1 as pb
def forever():
    yield from RawCall().messages()[:3]
    print("uploading", flush=True)
    time.sleep(600)
method = grpc.insecure_channel(sys.argv[1]).stream_stream(SELECT, request_serializer=pb.SelectRequest.SerializeToString)
list(method(forever()))
"""


def test_a_client_killed_in_mid_upload_is_counted_as_abandoned(server: Server) -> None:
    before = server.outcomes()
    support = os.path.join(os.path.dirname(__file__), os.pardir, "support")
    environment = {**os.environ, "PYTHONPATH": support}
    client = subprocess.Popen(
        [sys.executable, "-c", UPLOADER, server.address], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline().strip() == "uploading"
        assert wait_until(lambda: server.metric("graphkv_in_flight_bytes") > 0)
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait()
        client.communicate()
    assert server.settled()
    changed = {reason: count - before.get(reason, 0) for reason, count in server.outcomes().items()}
    assert {reason: count for reason, count in changed.items() if count} == {"abandoned": 1}


def open_files(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def test_cancelled_calls_are_abandoned_and_leave_nothing(server: Server) -> None:
    before, descriptors = server.outcomes().get("abandoned", 0), open_files(server)
    messages = RawCall(seed=7).messages()
    with grpc.insecure_channel(server.address) as channel:
        method = channel.stream_stream(SELECT, request_serializer=pb.SelectRequest.SerializeToString)
        for stop in range(1, len(messages)):
            never = threading.Event()

            def upto(stop: int = stop, never: threading.Event = never) -> Iterator[Any]:
                yield from messages[:stop]
                never.wait(30)

            running = method(upto())
            assert wait_until(lambda: server.metric("graphkv_in_flight_requests") == 1)
            running.cancel()
            never.set()
            assert server.settled()
    assert server.outcomes()["abandoned"] == before + len(messages) - 1
    assert_good(server.address)
    assert wait_until(lambda: open_files(server) <= descriptors)
