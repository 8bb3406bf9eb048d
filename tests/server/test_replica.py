"""A replica inside this process, as tests and a cluster run it: it starts, serves, drains and leaves nothing behind."""

import asyncio
import os
import threading

import google_crc32c
import grpc.aio
import pytest
from graphkv_proto import v1 as pb
from graphkv_server import cli, logs
from graphkv_server.config import Address, ServerConfig
from graphkv_server.listening import StartError
from graphkv_server.replica import Replica
from graphkv_testing.raw import SELECT, RawCall

ANY = Address("127.0.0.1", 0)


def config(**fields: object) -> ServerConfig:
    return ServerConfig(**{"address": ANY, "metrics_address": None, "device": "cpu", "threads": 1, **fields})  # type: ignore[arg-type]


async def answers(address: Address) -> int:
    async with grpc.aio.insecure_channel(str(address)) as channel:
        method = channel.stream_stream(
            SELECT, request_serializer=pb.SelectRequest.SerializeToString, response_deserializer=pb.SelectResponse.FromString
        )
        return len([response async for response in method(iter(RawCall().messages()))])


def test_it_serves_drains_and_leaves_no_thread_or_task() -> None:
    before = threading.active_count()

    async def body() -> None:
        replica = Replica(config(metrics_address=ANY))
        await replica.start()
        assert await answers(replica.address) == 3
        assert await replica.drain(30.0)
        await replica.stop()
        assert replica.admission.bytes_in_flight == 0
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    asyncio.run(body())
    assert not [thread for thread in threading.enumerate() if thread.name == "graphkv-engine"]
    assert threading.active_count() <= before + 1  # grpc.aio keeps its own poller


def test_two_replicas_in_one_process_do_not_mix() -> None:
    async def body() -> None:
        first, second = Replica(config()), Replica(config())
        await first.start()
        await second.start()
        assert first.address != second.address
        assert await answers(second.address) == 3
        samples = [replica.metrics.registry.get_sample_value("graphkv_kept_tokens_total") for replica in (first, second)]
        assert samples == [0, 2 * 2 * 7]
        await first.stop()
        assert await answers(second.address) == 3
        await second.stop()

    asyncio.run(body())


def test_stopping_what_never_started_is_harmless() -> None:
    asyncio.run(Replica(config()).stop())


@pytest.mark.parametrize("number", ["99", "256", "9" * 20])
def test_a_device_that_is_not_there_is_refused(number: str) -> None:
    with pytest.raises(StartError, match=f"--device is cuda:{number}, but torch sees"):
        Replica(config(device=f"cuda:{number}"))


def test_a_machine_that_cannot_say_which_cpus_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    asyncio.run(Replica(config(threads=0)).stop())


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70 + ".invalid"], ids=["unknown", "impossible"])
def test_a_host_that_is_not_there_is_told_from_a_taken_port(host: str) -> None:
    with pytest.raises(StartError, match=r"\(--address\): there is no such host"):
        asyncio.run(Replica(config(address=Address(host, 50051))).start())


@pytest.mark.parametrize(("implementation", "warned"), [("python", True), ("c", False)])
def test_slow_checksums_are_said_at_start(
    implementation: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(google_crc32c, "implementation", implementation)

    async def body() -> None:
        replica = Replica(config())
        await replica.start()
        await replica.stop()

    with caplog.at_level("WARNING", logger="graphkv_server"):
        asyncio.run(body())
    assert ("slow_checksums" in caplog.text) == warned


def test_ctrl_c_before_it_is_up_says_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(logs, "configure", lambda level: None)  # it is the whole process's
    monkeypatch.setattr(cli, "tune_process", interrupted)
    assert cli.main([]) == 130
    assert capfd.readouterr() == ("", "")
