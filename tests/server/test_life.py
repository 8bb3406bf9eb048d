"""A real server process from its start to its exit: settings, ports, drain, signals, overload and bounded memory."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import google_crc32c
import grpc
import numpy as np
import pytest
from google.protobuf.internal import api_implementation
from graphkv_proto import v1 as pb
from graphkv_testing.process import Server, serve, wait_until
from graphkv_testing.raw import Outcome, RawCall, call
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

MIB = 2**20


class Held:
    """Calls that stop in mid-upload until they are released."""

    def __init__(self, server: Server, count: int) -> None:
        self.go_on = threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self.calls: list[Future[Outcome]] = [
            self._pool.submit(call, server.address, self._messages(seed)) for seed in range(count)
        ]

    def _messages(self, seed: int) -> Iterator[Any]:
        messages = RawCall(seed=seed).messages()
        yield from messages[:3]
        self.go_on.wait(60)
        yield from messages[3:]

    def close(self) -> None:
        self.go_on.set()
        self._pool.shutdown()


@contextmanager
def held(server: Server, count: int) -> Iterator[Held]:
    """`count` calls in mid-upload, all of them seen by the server."""
    calls = Held(server, count)
    try:
        assert wait_until(lambda: server.metric("graphkv_in_flight_requests") == count)
        yield calls
    finally:
        calls.close()


def health(server: Server, service: str = "") -> Any:
    with grpc.insecure_channel(server.address) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status


def last_event(server: Server) -> dict[str, Any]:
    return json.loads([line for line in server.lines if line][-1])


def run_serve(*flags: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "graphkv_server.cli", *flags]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin", **environment}, check=False
    )


def test_sigterm_under_load_finishes_what_runs_refuses_what_is_new_and_exits_with_0() -> None:
    with serve("--grace", "60") as server:
        assert health(server) == health(server, "graphkv.v1.Compression") == health_pb2.HealthCheckResponse.SERVING
        with grpc.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            with held(server, 5) as calls:
                server.terminate(signal.SIGTERM)
                assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
                assert health(server) == health_pb2.HealthCheckResponse.NOT_SERVING
                refused = call(server.address, RawCall().messages())
                assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
                calls.go_on.set()
                outcomes = [running.result(60) for running in calls.calls]
        assert [outcome.code for outcome in outcomes] == [grpc.StatusCode.OK] * 5
        assert all(len(outcome.answers) == 2 for outcome in outcomes)
        assert server.wait() == 0
        assert last_event(server)["in_flight_bytes"] == 0


@pytest.mark.parametrize("ending", ["the grace is over", "a second signal"])
def test_what_does_not_finish_is_ended_with_unavailable(ending: str) -> None:
    with serve("--grace", "0.2" if ending == "the grace is over" else "60") as server, held(server, 3) as calls:
        server.terminate(signal.SIGINT)
        if ending == "a second signal":
            assert wait_until(lambda: health(server) == health_pb2.HealthCheckResponse.NOT_SERVING)
            server.terminate(signal.SIGTERM)
        outcomes = [running.result(60) for running in calls.calls]
        assert {(outcome.code, outcome.reason) for outcome in outcomes} == {(grpc.StatusCode.UNAVAILABLE, "DRAINING")}
        assert server.wait() == 0
        assert last_event(server)["in_flight_bytes"] == 0


def test_a_call_that_has_sent_nothing_does_not_hold_up_a_drain() -> None:
    with serve("--grace", "60") as server:
        never = threading.Event()

        def nothing() -> Iterator[Any]:
            never.wait(60)
            yield from ()

        with ThreadPoolExecutor(1) as pool:
            opened = pool.submit(call, server.address, nothing(), timeout=None)
            assert wait_until(lambda: server.metric("graphkv_in_flight_requests") == 1)
            server.terminate(signal.SIGTERM)
            outcome = opened.result(40)
            never.set()
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert server.wait() == 0


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for flags in (
            ("--address", address, "--metrics-address", "none"),
            ("--address", "127.0.0.1:0", "--metrics-address", address),
        ):
            ended = run_serve(*flags)
            assert ended.returncode == 2
            assert f"cannot listen on {address}" in ended.stderr
            assert ended.stdout == ""


def test_a_second_server_on_the_same_port_does_not_start() -> None:
    with serve() as server:
        ended = run_serve("--address", server.address, "--metrics-address", "none")
        assert ended.returncode == 2
        assert "the port is taken" in ended.stderr


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        (("--grace", "soon"), {}, "--grace is 'soon'; it must be seconds, at least 0"),
        ((), {"GRAPHKV_DEVICE": "tpu"}, "GRAPHKV_DEVICE is 'tpu'; it must be auto, cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), {}, "--device is cuda:99, but torch sees"),
        ((), {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}, "protobuf runs in pure Python"),
    ],
    ids=["flag", "variable", "no such GPU", "slow protobuf"],
)
def test_what_cannot_be_is_refused_at_start(flags: tuple[str, ...], environment: dict[str, str], said: str) -> None:
    ended = run_serve(*flags, **environment)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_tests_run_on_the_compiled_protobuf() -> None:
    assert api_implementation.Type() == "upb"


def test_capabilities_locate_and_reflection() -> None:
    with serve("--max-bytes-in-flight", "8MiB", "--device", "cpu") as server, grpc.insecure_channel(server.address) as channel:
        unary = {"request_serializer": lambda message: message.SerializeToString()}
        ask = channel.unary_unary(
            "/graphkv.v1.Compression/GetCapabilities", response_deserializer=pb.GetCapabilitiesResponse.FromString, **unary
        )
        known = ask(pb.GetCapabilitiesRequest(), timeout=10)
        assert (known.max_bytes_in_flight, known.max_message_bytes, known.chunk_bytes) == (8 * MIB, 4 * MIB, MIB)
        assert list(known.devices) == ["cpu"]
        assert pb.SCORER_SNAPKV in known.scorers
        assert known.metrics_address == server.metrics_address
        locate = channel.unary_unary(
            "/graphkv.v1.Compression/Locate", response_deserializer=pb.LocateResponse.FromString, **unary
        )
        (replica,) = locate(pb.LocateRequest(), timeout=10).replicas
        assert (replica.replica, replica.address) == (known.replica, server.address)
        listed = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
        )
        names = {entry.name for entry in next(listed).list_services_response.service}
        assert {"graphkv.v1.Compression", "grpc.health.v1.Health"} <= names


def test_too_many_calls_are_refused_with_the_time_to_come_back() -> None:
    with serve("--max-requests-in-flight", "2") as server, held(server, 2) as calls:
        refused = call(server.address, RawCall().messages())
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert refused.retry_after is not None
        assert health(server) == health_pb2.HealthCheckResponse.SERVING
        calls.go_on.set()
        assert [running.result(60).code for running in calls.calls] == [grpc.StatusCode.OK] * 2
        assert server.metric("graphkv_rejections_total", reason="OVERLOADED") == 1


def test_a_message_above_the_limit_is_refused() -> None:
    with serve("--max-message-bytes", "2MiB") as server:
        got = call(server.address, [pb.SelectRequest(chunks=[pb.Chunk(data=bytes(2 * MIB + 1))])])
        assert got.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert call(server.address, RawCall().messages()).code == grpc.StatusCode.OK


def large_call(layers: int, heads: int, tokens: int, head_dim: int) -> Iterator[Any]:
    """knorm without a graph; every layer has the same keys, so that the sender needs memory for one."""
    sent = RawCall(layers=1, kv_heads=heads, query_heads=heads, tokens=tokens, head_dim=head_dim, window=1)
    sent.header.policy.scorer = pb.SCORER_KNORM
    sent.header.policy.ClearField("graph")
    sent.header.policy.ClearField("window")
    sent.header.query_heads = 0
    sent.header.layers = layers
    data = sent.keys[0].tobytes()
    sent.header.largest_layer_bytes, sent.header.total_bytes = len(data), len(data) * layers
    yield pb.SelectRequest(header=sent.header)
    crc = 0
    for layer in range(layers):
        described = pb.Descriptor(
            id=layer, layer=layer, role=pb.ROLE_KEYS, dtype=pb.DTYPE_F32, dims=[heads, tokens, head_dim],
            layout=pb.LAYOUT_HND, count=tokens, byte_length=len(data),
        )  # fmt: skip
        yield pb.SelectRequest(descriptors=[described])
        for start in range(0, len(data), MIB):
            part = data[start : start + MIB]
            crc = google_crc32c.extend(crc, part)
            yield pb.SelectRequest(chunks=[pb.Chunk(descriptor=layer, offset=start, data=part)])
    yield pb.SelectRequest(end=pb.End(descriptors=layers, bytes=len(data) * layers, crc32c=crc))


def test_memory_is_bounded_by_the_bytes_in_flight_whatever_comes() -> None:
    """Calls of 96 MiB in layers of 8 MiB, six at a time, through a bound of 24 MiB; a layer above it is refused."""
    bound = 24 * MIB
    with serve("--max-bytes-in-flight", "24MiB") as server:
        refused = call(server.address, large_call(2, 4, 1 << 14, 100))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "TOO_LARGE")
        assert refused.fields == ["largest_layer_bytes"]
        with ThreadPoolExecutor(6) as pool:
            outcomes = list(pool.map(lambda _: call(server.address, large_call(12, 4, 1 << 14, 32)), range(6)))
        assert [outcome.code for outcome in outcomes] == [grpc.StatusCode.OK] * 6, outcomes[0].message
        assert all(len(outcome.answers) == 12 for outcome in outcomes)
        assert len({np.frombuffer(outcome.answers[0, 0].values, "<i4").tobytes() for outcome in outcomes}) == 1
        assert server.settled()
        assert server.peak_rss() <= bound + 400 * MIB
