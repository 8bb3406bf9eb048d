"""Callers of `graphkv-serve --ray` notice nothing of replicas and controllers that die, and go to the replicas directly."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from graphkv_client import CompressClient, Policy, Selection
from graphkv_testing.cluster import Cluster, serve_many
from graphkv_testing.process import wait_until

import graphkv

POLICY = Policy(40)


@pytest.fixture(scope="module")
def prompt() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    return {
        "keys": rng.standard_normal((2, 3, 131, 16), dtype=np.float32),
        "queries": rng.standard_normal((2, 6, 32, 16), dtype=np.float32),
    }


class Callers:
    """Threads that call again and again; `where`: who answered, `errors`: what they saw, `attempts`, `calls`."""

    def __init__(self, client: CompressClient, prompt: dict[str, Any], threads: int) -> None:
        self._client = client
        self._prompt = prompt
        self._expected = graphkv.select(**prompt, policy=POLICY)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.where: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self.calls = self.attempts = 0
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                kept = self._client.select(**self._prompt, policy=POLICY)
                assert isinstance(kept, Selection)
                for own, other in zip(kept, self._expected, strict=True):
                    np.testing.assert_array_equal(own.indices, other.indices)  # type: ignore[union-attr]
            except BaseException as error:  # noqa: BLE001  # the test raises it
                self.errors.append(error)
                return
            with self._lock:
                self.where[kept.summary.where] += 1
                self.calls += 1
                self.attempts += kept.summary.attempts
            time.sleep(0.01)

    def more(self, count: int) -> None:
        aim = self.calls + count
        assert wait_until(lambda: self.calls >= aim or self.errors, 90)
        assert not self.errors, self.errors

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)


@contextmanager
def calling(client: CompressClient, prompt: dict[str, Any], threads: int = 4) -> Iterator[Callers]:
    callers = Callers(client, prompt, threads)
    try:
        yield callers
    finally:
        callers.stop()
    assert not callers.errors, callers.errors


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    with serve_many("--replicas", "3") as running:
        assert running.has(3)
        yield running


def test_calls_go_to_the_replicas_themselves(three: Cluster, prompt: dict[str, Any]) -> None:
    with CompressClient(three.address) as client, calling(client, prompt) as callers:
        callers.more(150)
        callers.stop()
        assert set(callers.where) == set(three.located())
        assert callers.attempts == callers.calls


@pytest.mark.timeout(240)
def test_killed_and_frozen_replicas_are_not_noticed(three: Cluster, prompt: dict[str, Any]) -> None:
    with CompressClient(three.address, attempt_timeout=2.0) as client, calling(client, prompt) as callers:
        callers.more(40)
        for _ in range(2):
            before = set(three.located())
            os.kill(three.replicas()[0], signal.SIGKILL)
            callers.more(100)
            assert wait_until(lambda before=before: len(set(three.located()) - before) >= 1 and three.has(3), 90)
        callers.more(40)
        frozen = three.replicas()[0]
        os.kill(frozen, signal.SIGSTOP)
        try:
            callers.more(300)
            time.sleep(5)
            named = set(three.located())
            assert len(named) == 2
        finally:
            os.kill(frozen, signal.SIGCONT)
        assert three.has(3)
        (back,) = set(three.located()) - named
        seen = callers.where[back]
        assert wait_until(lambda: callers.where[back] > seen, 60)
        callers.stop()
        print(callers.calls, "calls,", callers.attempts - callers.calls, "sent again,", dict(callers.where))


@pytest.mark.timeout(240)
def test_calls_go_on_without_controllers(three: Cluster, prompt: dict[str, Any]) -> None:
    with CompressClient(three.address) as client, calling(client, prompt) as callers:
        callers.more(40)
        three.kill("ServeController")
        callers.more(200)
        three.kill("gcs_server")
        callers.more(200)
