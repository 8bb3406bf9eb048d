"""The Serve application as an operator deploys it: built, deployed, updated, broken and put right, scaled; seen by callers."""

import functools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from graphkv_client import CompressClient
from graphkv_proto import service
from graphkv_proto import v1 as pb
from graphkv_testing.cluster import Head, below_of, free_port, located, ray_head
from graphkv_testing.process import wait_until
from graphkv_testing.raw import RawCall

import graphkv
from graphkv import Policy

ROOT = Path(__file__).parents[2]
POLICY = Policy.paper(budget=16)
GRPC_PORT = free_port()
PROXY = f"127.0.0.1:{GRPC_PORT}"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as running:
        yield running


def shipped(**arguments: Any) -> dict[str, Any]:
    """deploy/ray/serve.yaml, on free ports of the loopback."""
    config = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    config["http_options"]["port"] = free_port()
    config["grpc_options"]["port"] = GRPC_PORT
    settings = {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0", "device": "cpu", "grace": 10}
    config["applications"][0]["args"] |= {"settings": settings, **arguments}
    return dict(config)


def replicas() -> int:
    try:
        return len(located(PROXY))
    except grpc.RpcError:
        return 0


def names(head: Head) -> set[int]:
    return {one.pid for one in below_of(head.process.pid) if "ray::ServeReplica" in one.title}


def prompt(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "keys": rng.standard_normal((2, 2, 120, 8), dtype=np.float32),
        "queries": rng.standard_normal((2, 4, 32, 8), dtype=np.float32),
        "policy": POLICY,
    }


def plain(selection: Any) -> list[list[list[int]]]:
    return [np.asarray(layer.indices).tolist() for layer in selection.layers]


@functools.cache
def wanted(seed: int) -> list[list[list[int]]]:
    return plain(graphkv.select(**prompt(seed)))


class Traffic:
    """Callers that call one after the other, through Locate, as long as the block lasts; every answer is compared."""

    def __init__(self, callers: int = 1) -> None:
        self.calls = 0
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(callers)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with CompressClient(PROXY) as client:
            while not self._stop.is_set():
                self.calls += 1  # a call may be lost to another thread's: there are more than are counted
                seed = self.calls % 16
                try:
                    if plain(client.select(**prompt(seed))) != wanted(seed):
                        self.failures.append("another answer")
                except graphkv.GraphKVError as error:
                    self.failures.append(repr(error))
                time.sleep(0.05)


@contextmanager
def holding(address: str) -> Iterator[None]:
    """A call that has sent some keys of a layer that takes seven eighths of the replica's MiB, and waits with the rest."""
    policy = Policy(budget=16, scorer="knorm", graph=None)
    patient = CompressClient(address, locate=False, timeout=400, attempt_timeout=400)
    with patient as client, client.stream(num_layers=1, num_tokens=3584, policy=policy) as stream:
        stream.put(0, start=0, keys=np.zeros((2, 1000, 32), np.float32))
        yield


def test_what_serve_build_writes_runs(head: Head) -> None:
    path = head.folder / "built.yaml"
    head.serve("build", "graphkv_server.ray:default_app", "--output-path", str(path))
    built = yaml.safe_load(path.read_text())
    assert built["applications"][0]["import_path"] == "graphkv_server.ray:default_app"
    built["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    built["grpc_options"] = shipped()["grpc_options"]
    built["applications"][0]["name"] = "graphkv"
    head.deploy(built)
    head.runs()
    assert wait_until(lambda: replicas() == 1, 30)
    given = prompt(1)
    with CompressClient(PROXY) as client:
        assert plain(client.select(**given)) == plain(graphkv.select(**given))


def test_the_shipped_config_runs_and_the_proxy_passes_everything_on(head: Head) -> None:
    head.deploy(shipped())
    head.runs()
    assert wait_until(lambda: replicas() == 2, 60)
    with grpc.insecure_channel(PROXY) as channel:
        capabilities = service.multicallable(channel, service.GET_CAPABILITIES)(pb.GetCapabilitiesRequest(), timeout=20)
        assert capabilities.replica in located(PROXY)
        answers = list(service.multicallable(channel, service.SELECT)(iter(RawCall().messages()), timeout=30))
        assert len(answers) == 3
        with pytest.raises(grpc.RpcError) as caught:
            list(service.multicallable(channel, service.SELECT)(iter([pb.SelectRequest()]), timeout=30))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_callers_notice_neither_kills_nor_an_update(head: Head) -> None:
    """800 calls while 4 replicas are killed, never the last, and a rolling update replaces what is there."""
    with Traffic(callers=4) as traffic:
        for _ in range(4):
            assert wait_until(lambda: replicas() == 2, 150)
            os.kill(random.choice(sorted(names(head))), signal.SIGKILL)
            assert wait_until(lambda: replicas() == 1, 20)
        assert wait_until(lambda: replicas() == 2, 150)
        before = names(head)
        head.deploy(shipped(settings={**shipped()["applications"][0]["args"]["settings"], "queue_timeout": 7}))
        assert wait_until(lambda: not before & names(head), 200)
        head.runs()
        assert wait_until(lambda: traffic.calls >= 800, 100)
    assert traffic.failures == []
    assert wait_until(lambda: replicas() == 2, 20)


def test_a_broken_update_leaves_the_old_replicas_in_service_and_can_be_put_right(head: Head) -> None:
    before = names(head)
    with Traffic() as traffic:
        head.deploy(shipped(settings={**shipped()["applications"][0]["args"]["settings"], "device": "cuda:9"}, start_tries=2))
        assert wait_until(lambda: head.status() not in ("RUNNING", "DEPLOYING"), 200), head.told()
        assert before <= names(head)
        assert replicas() == 2
        head.deploy(shipped())
        head.runs()
    assert traffic.failures == []
    assert wait_until(lambda: replicas() == 2, 20)


def test_replicas_come_with_a_step_of_load_and_go_after_it(head: Head) -> None:
    """A stream that holds its layer is the load: from one replica to four, and back to one, without a failed call."""
    args = {"replicas": 1, "max_replicas": 4, "cpus": 0.5, "up_delay": 1.0, "down_delay": 6.0, "target_bytes_ratio": 0.2}
    settings = {**shipped()["applications"][0]["args"]["settings"], "max_bytes_in_flight": "1MiB", "stall_timeout": 400}
    head.deploy(shipped(settings=settings, **args))
    head.runs()
    assert wait_until(lambda: replicas() == 1, 60)
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if (number := replicas()) and (not seen or seen[-1] != number):
                seen.append(number)
            time.sleep(0.3)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with Traffic() as traffic:
            with holding(next(iter(located(PROXY).values()))):
                assert wait_until(lambda: replicas() == 4, 150), seen
            assert wait_until(lambda: replicas() == 1, 150), seen
        assert traffic.failures == []
    finally:
        done.set()
        watching.join()
    assert seen == sorted(seen[: seen.index(4) + 1]) + sorted(seen[seen.index(4) + 1 :], reverse=True), seen
