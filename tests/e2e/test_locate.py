"""Finding replicas: what cannot be reached from here costs nothing, and what somebody else answers for is not called."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from graphkv_client import AsyncCompressClient, CompressClient, Policy, Selection
from graphkv_client._channel import is_spread
from graphkv_testing.fleet import Fleet, fleet
from graphkv_testing.process import wait_until

POLICY = Policy(40)


@pytest.fixture(scope="module")
def two() -> Iterator[Fleet]:
    with fleet(2) as running:
        yield running


@pytest.fixture
def prompt() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    return {
        "keys": rng.standard_normal((1, 3, 201, 16), dtype=np.float32),
        "queries": rng.standard_normal((1, 6, 32, 16), dtype=np.float32),
    }


def asked(client: CompressClient, prompt: dict[str, Any]) -> tuple[str, int]:
    kept = client.select(**prompt, policy=POLICY)
    assert isinstance(kept, Selection)
    return kept.summary.where, kept.summary.attempts


def test_replicas_that_cannot_be_reached_leave_the_address(two: Fleet, prompt: dict[str, Any]) -> None:
    """As behind a proxy: what Locate names is elsewhere, refuses, swallows packets, or is another service."""
    entries = [two.unlist(member) for member in two.members]
    names = {"refuses": "127.0.0.1:9", "swallows": "10.255.255.1:50051", "elsewhere": "no-such-host.invalid:50051"}
    names["another"] = two.members[1].address
    for name, address in names.items():
        two.claim(name, address)
    try:
        with CompressClient(two.members[0].address) as client:
            wheres = {asked(client, prompt) for _ in range(10)}
            assert len(wheres) == 1
            assert {attempts for _, attempts in wheres} == {1}, "nobody's call was the one to find out"
            two.relist(entries[1])  # now one of them can be reached
            (given,) = wheres
            assert wait_until(lambda: asked(client, prompt)[0] != given[0])

        async def ask() -> None:
            async with AsyncCompressClient(two.members[0].address) as own:
                kept = await own.select(**prompt, policy=POLICY)
                assert isinstance(kept, Selection)
                assert kept.summary.attempts == 1

        asyncio.run(ask())
    finally:
        for name in names:
            (two._folder / f"{name}.json").unlink()
        two.relist(entries[0])


def test_a_replica_that_joins_gets_its_share(two: Fleet, prompt: dict[str, Any]) -> None:
    with CompressClient(two.members[0].address) as client:
        asked(client, prompt)
        name = two.name(two.start())
        assert wait_until(lambda: asked(client, prompt)[0] == name)


def test_capabilities_and_ping_are_answered_by_whoever_lives(two: Fleet, prompt: dict[str, Any]) -> None:
    victim = two.start()
    with CompressClient(victim.address) as client:
        assert wait_until(lambda: asked(client, prompt)[0] != two.name(victim))
        two.kill(victim)
        living = {two.name(member) for member in two.members if member is not victim}
        for _ in range(10):
            assert client.capabilities().replica in living
            assert client.ping() > 0
        two.unlist(victim)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:5",
        "[::1]:5",
        "localhost:5",
        "unix:/run/x.sock",
        "dns:///127.0.0.1:5",
        "no-such-host.invalid:5",
        "ipv4:1.2.3.4:5",
    ],
)
def test_one_host_is_no_spread(address: str) -> None:
    assert not is_spread(address)


def test_a_name_with_several_hosts_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {"graphkv": ["10.0.0.1", "10.0.0.2"]}

    def found(host: str, *rest: Any, **named: Any) -> list[Any]:
        return [(2, 1, 6, "", (place, 0)) for place in hosts[host]]

    monkeypatch.setattr("socket.getaddrinfo", found)
    assert is_spread("graphkv:50051")
    assert is_spread("dns:///graphkv:50051")
    assert is_spread("dns://8.8.8.8/graphkv:50051")
    assert is_spread("ipv4:10.0.0.1:5,10.0.0.2:5")
