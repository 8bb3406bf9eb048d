"""Replicas that find each other by asking each other, and the front before them: real servers in this process, no Ray."""

import asyncio
import json
import threading
import urllib.request
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from graphkv_client import CompressClient
from graphkv_proto import service
from graphkv_proto import v1 as pb
from graphkv_server.config import Address, ServerConfig
from graphkv_server.engine import engine
from graphkv_server.pulse import PAUSE_AFTER, Pulse, StuckError
from graphkv_server.ray.directory import PERIOD, PeerDirectory
from graphkv_server.ray.front import Front
from graphkv_server.replica import Replica
from graphkv_testing.raw import RawCall
from grpc_health.v1 import health_pb2, health_pb2_grpc

ANY = Address("127.0.0.1", 0)
CONFIG = ServerConfig(address=ANY, metrics_address=ANY, device="cpu", threads=1, grace=5.0)


class Town:
    """Replicas that share a register, and whoever looks at them."""

    def __init__(self) -> None:
        self.addresses: set[str] = set()
        self.reachable = True
        self.replicas: list[Replica] = []

    async def register(self) -> Collection[str]:
        if not self.reachable:
            await asyncio.Event().wait()
        return set(self.addresses)

    async def add(self, **fields: Any) -> Replica:
        replica = Replica(CONFIG, directory=PeerDirectory(self.register), **fields)
        await replica.start()
        self.addresses.add(str(replica.address))
        self.replicas.append(replica)
        return replica


@asynccontextmanager
async def town(number: int) -> AsyncIterator[Town]:
    own = Town()
    try:
        for _ in range(number):
            await own.add()
        yield own
    finally:
        for replica in own.replicas:
            await replica.stop()


@asynccontextmanager
async def front(own: Town) -> AsyncIterator[Front]:
    before = Front(CONFIG, PeerDirectory(own.register))
    await before.start()
    try:
        yield before
    finally:
        await before.stop()


async def until(condition: Any, seconds: float = 20.0) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, "it never came"
        await asyncio.sleep(0.02)


def named(replica: Replica) -> set[str]:
    return {seat.replica for seat in replica.directory.seats()}


def names(replicas: list[Replica]) -> set[str]:
    return {replica.name for replica in replicas}


async def all_know_all(own: Town) -> None:
    await until(lambda: all(named(replica) == names(own.replicas) for replica in own.replicas))


async def ask(address: object, method: Any, request: Any) -> Any:
    async with grpc.aio.insecure_channel(str(address)) as channel:
        return await service.multicallable(channel, method)(request, timeout=10)


def test_replicas_find_each_other_and_every_one_answers_for_all() -> None:
    async def body() -> None:
        async with town(3) as own:
            await all_know_all(own)
            for replica in own.replicas:
                answer = await ask(replica.address, service.LOCATE, pb.LocateRequest())
                assert {one.address for one in answer.replicas} == own.addresses
                assert {one.max_bytes_in_flight for one in answer.replicas} == {CONFIG.max_bytes_in_flight}
            limited = await ask(own.replicas[0].address, service.LOCATE, pb.LocateRequest(limit=2))
            assert len(limited.replicas) == 2
            found = [await ask(one.address, service.LOCATE, pb.LocateRequest(group="g")) for one in own.replicas]
            assert len({answer.replicas[0].address for answer in found}) == len(found[0].replicas) == 1

    asyncio.run(body())


def test_a_new_replica_is_found_without_the_register_by_who_knows_one_that_does() -> None:
    async def body() -> None:
        async with town(2) as own:
            await all_know_all(own)
            third = await own.add()
            own.addresses.clear()  # the first two never read of it: they hear of it, and it hears of them
            own.addresses.add(str(own.replicas[0].address))
            own.replicas[0].directory._watch.learn([str(third.address)])  # type: ignore[attr-defined]
            await all_know_all(own)

    asyncio.run(body())


def test_without_the_register_the_directory_goes_on() -> None:
    async def body() -> None:
        async with town(2) as own:
            await all_know_all(own)
            own.reachable = False
            gone = own.replicas.pop()
            await gone.stop()
            await until(lambda: named(own.replicas[0]) == names(own.replicas))

    asyncio.run(body())


def test_who_drains_leaves_the_list_while_it_still_answers() -> None:
    async def body() -> None:
        async with town(2) as own:
            await all_know_all(own)
            first, second = own.replicas
            await second.drain(0.0)
            assert second.name not in named(second)
            await until(lambda: named(first) == {first.name})
            answer = await ask(second.address, service.LOCATE, pb.LocateRequest())
            assert [one.replica for one in answer.replicas] == [first.name]

    asyncio.run(body())


@contextmanager
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The engine of one replica hangs in its computation from now on, until the event is set."""
    release = threading.Event()
    work = engine.Engine._outcomes

    def hanging(self: Any, batch: Any) -> Any:
        if self._metrics is hanging.metrics:  # type: ignore[attr-defined]
            release.wait(60)
        return work(self, batch)

    hanging.metrics = None  # type: ignore[attr-defined]
    monkeypatch.setattr(engine.Engine, "_outcomes", hanging)
    release.hang = lambda replica: setattr(hanging, "metrics", replica.metrics)  # type: ignore[attr-defined]
    try:
        yield release
    finally:
        release.set()


def test_an_engine_that_hangs_takes_its_replica_out_and_its_progress_back_in(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        with stuck(monkeypatch) as release:
            async with town(2) as own:
                first, second = own.replicas
                for replica in own.replicas:
                    replica.watch_engine()
                await all_know_all(own)
                release.hang(second)  # type: ignore[attr-defined]
                await until(lambda: named(first) == {first.name})
                second.check()  # not dead yet: a batch may take long
                async with grpc.aio.insecure_channel(str(second.address)) as channel:
                    stub = health_pb2_grpc.HealthStub(channel)
                    answer = await stub.Check(health_pb2.HealthCheckRequest())
                    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
                    release.set()
                    await all_know_all(own)
                    answer = await stub.Check(health_pb2.HealthCheckRequest())
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(body())


def test_an_engine_that_fails_every_time_is_dead() -> None:
    async def body() -> None:
        replica = Replica(CONFIG)
        await replica.start()
        now = [0.0]

        async def paused(state: bool) -> None:
            states.append(state)

        states: list[bool] = []
        pulse = Pulse(replica._engine, replica.admission, paused, clock=lambda: now[0])
        replica._engine._select = lambda work: 1 / 0  # type: ignore[assignment, return-value]
        pulse.start()
        await until(lambda: states == [True])
        with pytest.raises(StuckError, match=r"failed \d tiny selections in a row"):
            pulse.check()
        await pulse.stop()
        await replica.stop()

    asyncio.run(body())


def test_the_pulse_counts_from_the_last_batch() -> None:
    class Idle:
        batches = 7

        def open(self) -> Any:
            raise AssertionError("not before the next period")

    async def body() -> None:
        now, states = [0.0], []

        async def paused(state: bool) -> None:
            states.append(state)

        pulse = Pulse(Idle(), None, paused, clock=lambda: now[0])  # type: ignore[arg-type]
        pulse._tasks = [asyncio.create_task(pulse._watch())]
        await until(lambda: pulse._batches == 7)
        now[0] = PAUSE_AFTER + 0.1
        await until(lambda: states == [True])
        pulse.check()
        now[0] = 31.0
        with pytest.raises(StuckError, match="ended no batch for 31 s"):
            pulse.check()
        await pulse.stop()

    asyncio.run(body())


def test_the_front_names_replicas_and_passes_calls_on() -> None:
    async def body() -> None:
        async with town(2) as own, front(own) as before:
            await before.seats(2)
            located = await ask(before.address, service.LOCATE, pb.LocateRequest())
            assert {one.address for one in located.replicas} == own.addresses
            capabilities = await ask(before.address, service.GET_CAPABILITIES, pb.GetCapabilitiesRequest())
            assert capabilities.replica in names(own.replicas)
            async with grpc.aio.insecure_channel(str(before.address)) as channel:
                answers = [one async for one in service.multicallable(channel, service.SELECT)(iter(RawCall().messages()))]
                assert len(answers) == 3
                assert answers[-1].summary.replica in names(own.replicas)
                bad = service.multicallable(channel, service.SELECT)(iter([pb.SelectRequest()]))
                with pytest.raises(grpc.aio.AioRpcError, match="no header") as caught:
                    _ = [one async for one in bad]
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert any(key == "grpc-status-details-bin" for key, _ in caught.value.trailing_metadata() or ())
            line = await before.ready_line()
            assert f"address={before.address} " in line
            assert line.endswith("device=cpu replicas=2")

    asyncio.run(body())


def test_the_front_is_healthy_as_long_as_there_is_a_replica() -> None:
    async def health(channel: grpc.aio.Channel) -> int:
        return int((await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status)

    async def body() -> None:
        async with town(0) as own, front(own) as before, grpc.aio.insecure_channel(str(before.address)) as channel:
            assert await health(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError, match="no replica answers") as caught:
                await ask(before.address, service.GET_CAPABILITIES, pb.GetCapabilitiesRequest())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            await own.add()
            await before.seats(1)
            await asyncio.sleep(2 * PERIOD)
            assert await health(channel) == health_pb2.HealthCheckResponse.SERVING
            await before.drain()
            assert await health(channel) == health_pb2.HealthCheckResponse.NOT_SERVING

    asyncio.run(body())


def test_metrics_addresses_as_prometheus_reads_them() -> None:
    def read(address: object, path: str) -> Any:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.headers["Content-Type"], answer.read()

    async def body() -> None:
        async with town(2) as own, front(own) as before:
            await before.seats(2)
            await all_know_all(own)
            for address in (before.metrics_address, own.replicas[0].metrics_address):
                kind, text = await asyncio.to_thread(read, address, "/sd")
                assert kind.startswith("application/json")
                groups = {group["labels"]["replica"]: group["targets"] for group in json.loads(text)}
                assert groups == {one.name: [str(one.metrics_address)] for one in own.replicas}
            _, text = await asyncio.to_thread(read, before.metrics_address, "/metrics")
            assert b"graphkv_known_replicas 2.0" in text

    asyncio.run(body())


def test_where_all_addresses_are_listened_on_others_are_told_one_that_reaches() -> None:
    async def body() -> None:
        config = ServerConfig(address=Address("0.0.0.0", 0), metrics_address=Address("0.0.0.0", 0), device="cpu", threads=1)
        replica = Replica(config, host="127.0.0.1")
        await replica.start()
        seat = replica.seat()
        assert seat.address == f"127.0.0.1:{replica.address.port}"
        assert replica.metrics_address is not None
        assert seat.metrics_address == f"127.0.0.1:{replica.metrics_address.port}"
        await replica.stop()

    asyncio.run(body())


def test_the_sdk_works_through_the_front() -> None:
    async def body() -> None:
        async with town(2) as own, front(own) as before:
            await before.seats(2)

            def replica() -> str:
                with CompressClient(str(before.address)) as client:
                    return client.capabilities().replica

            assert await asyncio.to_thread(replica) in names(own.replicas)

    asyncio.run(body())
