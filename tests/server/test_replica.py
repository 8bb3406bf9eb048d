"""A replica inside this process, as tests and a cluster run it: it starts, serves, drains and leaves nothing behind."""

import asyncio
import threading

import grpc.aio
import pytest
from graphkv_proto import v1 as pb
from graphkv_server.config import Address, ServerConfig
from graphkv_server.replica import Replica, StartError
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


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(StartError, match="--device is cuda:99"):
        Replica(config(device="cuda:99"))
