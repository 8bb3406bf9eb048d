"""`graphkv-serve --ray`: the same answers through every address, replicas that die or freeze, and an end that leaves nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from graphkv_client import CompressClient
from graphkv_testing.cluster import Cluster, free_of, located, processes, serve_many
from graphkv_testing.process import serve, wait_until

import graphkv
from graphkv import Policy

POLICY = Policy.paper(budget=16)


def prompt(seed: int = 7) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "keys": rng.standard_normal((2, 2, 120, 8), dtype=np.float32),
        "queries": rng.standard_normal((2, 4, 32, 8), dtype=np.float32),
        "policy": POLICY,
    }


def expected(seed: int = 7) -> list[list[list[int]]]:
    answer = graphkv.select(**prompt(seed))
    return [np.asarray(layer.indices).tolist() for layer in answer.layers]


def selected(address: str, seed: int = 7, **options: Any) -> list[list[list[int]]]:
    with CompressClient(address, **options) as client:
        return [np.asarray(layer.indices).tolist() for layer in client.select(**prompt(seed)).layers]


def test_it_says_once_that_it_is_ready(cluster: Cluster) -> None:
    assert re.fullmatch(r"graphkv-serve \S+ ready: address=\S+ metrics=\S+ device=cpu replicas=2", cluster.server.ready)


def test_every_address_answers_and_alike(cluster: Cluster) -> None:
    seats = cluster.located()
    assert len(seats) == 2
    assert wait_until(lambda: all(located(address) == seats for address in seats.values()))
    for address in (cluster.address, *seats.values()):
        assert selected(address, locate=False) == selected(address) == expected()


def test_metrics_of_every_replica_are_found(cluster: Cluster) -> None:
    with urllib.request.urlopen(f"http://{cluster.server.metrics_address}/sd", timeout=10) as answer:
        groups = json.load(answer)
    assert {group["labels"]["replica"] for group in groups} == set(cluster.located())
    for group in groups:
        with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=10) as answer:
            assert b"graphkv_build_info" in answer.read()


def listening(pids: set[int]) -> set[tuple[int, str, int]]:
    """(process, host in hex, port) of every TCP socket that these processes listen on."""
    inodes = {}
    for pid in pids:
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                try:
                    inodes[os.readlink(f"/proc/{pid}/fd/{name}")] = pid
                except OSError:
                    continue
        except OSError:
            continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            for line in list(lines)[1:]:
                fields = line.split()
                pid = inodes.get(f"socket:[{fields[9]}]")
                if fields[3] == "0A" and pid is not None:
                    host, _, port = fields[1].partition(":")
                    found.add((pid, host, int(port, 16)))
    return found


def test_nothing_but_what_asks_for_the_token_listens_beyond_the_loopback(cluster: Cluster) -> None:
    replicas = set(cluster.replicas())
    everywhere = {
        (pid, port)
        for pid, host, port in listening({cluster.server.pid, *(one.pid for one in cluster.descendants())})
        if set(host) == {"0"}
    }
    assert {pid for pid, _ in everywhere} <= replicas, "Serve's own port of a replica takes every address"
    for _, port in everywhere:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, caught.value


def test_a_frozen_replica_is_left_out_and_comes_back(cluster: Cluster) -> None:
    assert cluster.has(2)
    pid = cluster.replicas()[0]
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert cluster.has(1, 20)
        print("left out after", time.monotonic() - started)
        (address,) = cluster.located().values()
        assert wait_until(lambda: len(located(address)) == 1), "its neighbour knows it, too"
        assert selected(address) == expected()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert cluster.has(2, 20)
    assert pid in cluster.replicas(), "it was not replaced"


def test_a_killed_replica_is_left_out_and_replaced(cluster: Cluster) -> None:
    before = cluster.located()
    killed = cluster.kill("ray::ServeReplica")
    assert cluster.has(1, 20)
    assert selected(cluster.address) == expected()
    assert cluster.has(2)
    assert killed not in cluster.replicas()
    assert len(set(cluster.located()) - set(before)) == 1


def test_without_serves_controller_callers_notice_nothing(cluster: Cluster) -> None:
    assert cluster.has(2)
    before = cluster.located()
    killed = cluster.kill("ray::ServeController")
    for seed in range(10):
        assert selected(cluster.address, seed) == expected(seed)
        assert cluster.located() == before
    assert wait_until(lambda: bool(set(cluster.pids("ray::ServeController")) - {killed}), 60), "Ray starts another"
    assert cluster.located() == before


def test_a_call_that_runs_ends_before_the_end(cluster: Cluster) -> None:
    """SIGTERM while a stream is half sent: it is answered, the exit code is 0, and no process is left."""
    assert cluster.has(2)
    pids = [one.pid for one in cluster.descendants()]
    address = next(iter(cluster.located().values()))
    layers = expected()
    given = prompt()
    with CompressClient(address, locate=False) as client, client.stream(num_layers=2, policy=POLICY) as stream:
        stream.put(0, keys=given["keys"][0], queries=given["queries"][0])
        time.sleep(1.0)
        cluster.server.terminate()
        assert wait_until(lambda: address not in cluster.located().values(), 30), "it drains"
        stream.put(1, keys=given["keys"][1], queries=given["queries"][1])
        got = sorted(stream, key=lambda layer: layer.layer)
    assert [np.asarray(layer.indices).tolist() for layer in got] == layers
    assert cluster.server.wait(60) == 0
    assert free_of(pids)


def test_without_rays_head_callers_notice_nothing_and_the_end_is_an_end() -> None:
    with serve_many("--replicas", "2", "--grace", "1") as cluster:
        before = cluster.located()
        cluster.kill("gcs_server")
        for seed in range(20):
            assert selected(cluster.address, seed) == expected(seed)
        killed = cluster.kill("ray::ServeReplica")
        assert cluster.has(1, 20)
        assert selected(cluster.address) == expected()
        assert killed not in cluster.replicas()
        (address,) = cluster.located().values()
        assert address in before.values()
        cluster.server.terminate()
        assert cluster.server.wait(60) == 0


def test_a_signal_while_it_starts_ends_it() -> None:
    failure: list[str] = []

    def run() -> None:
        try:
            with serve("--ray", "--device", "cpu"):
                pass
        except RuntimeError as error:
            failure.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert wait_until(lambda: any("--ray" in one.title for one in processes()), 20)
    time.sleep(4)
    for one in processes():
        if "graphkv_server.cli" in one.title and "--ray" in one.title:
            os.kill(one.pid, signal.SIGTERM)
    thread.join(90)
    assert failure
    assert "did not start" in failure[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpus_that_are_not_there_are_refused() -> None:
    command = [sys.executable, "-m", "graphkv_server.cli", "--ray", "--replica-gpus", "0.5", "--replicas", "2"]
    command += ["--address", "127.0.0.1:0", "--metrics-address", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "graphkv-serve: --replica-gpus is 0.5 for 2 replicas, but Ray sees 0 GPUs here" in done.stderr
    assert done.stdout == ""
