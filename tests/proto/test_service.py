"""The RPC table on real sockets: sync and aio channels, a sync and an aio server, bytes that are no message."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
import pytest
from graphkv_proto import messages, service
from graphkv_proto import v1 as pb
from graphkv_proto.status import from_status, to_status

from graphkv.terms.errors import GraphKVError, InvalidInputError, OverloadedError, Reason

UNARY = {service.GET_CAPABILITIES: pb.GetCapabilitiesRequest(minor=3), service.LOCATE: pb.LocateRequest(group="g")}


def echo(request: pb.SelectRequest) -> pb.SelectResponse:
    if request.header.request_id == "full":
        raise OverloadedError("no room for a layer — now", retry_after=0.25, request_id="full")
    return pb.SelectResponse(summary=pb.Summary(request_id=request.header.request_id))


def ask(request_id: str) -> pb.SelectRequest:
    return pb.SelectRequest(header=pb.Header(request_id=request_id))


class Implementation:
    """Echoes, as a sync server's handlers."""

    def select(self, requests: Iterator[pb.SelectRequest], context: Any) -> Iterator[pb.SelectResponse]:
        for request in requests:
            try:
                yield echo(request)
            except GraphKVError as error:
                code, message, trailing = to_status(error)
                context.set_trailing_metadata(trailing)
                context.abort(code, message)

    def get_capabilities(self, request: pb.GetCapabilitiesRequest, context: Any) -> pb.GetCapabilitiesResponse:
        return pb.GetCapabilitiesResponse(minor=request.minor)

    def locate(self, request: pb.LocateRequest, context: Any) -> pb.LocateResponse:
        return pb.LocateResponse(replicas=[pb.Replica(replica=request.group)])

    def table(self) -> dict[service.Method[Any, Any], Any]:
        return {
            service.SELECT: self.select,
            service.GET_CAPABILITIES: self.get_capabilities,
            service.LOCATE: self.locate,
        }


class AsyncImplementation(Implementation):
    """Echoes, as an aio server's handlers."""

    async def select(self, requests: AsyncIterator[pb.SelectRequest], context: Any) -> None:  # type: ignore[override]
        try:
            async for request in requests:
                await context.write(echo(request))
        except GraphKVError as error:
            await context.abort(*to_status(error))

    async def get_capabilities(self, request: Any, context: Any) -> Any:  # type: ignore[override]
        return super().get_capabilities(request, context)

    async def locate(self, request: Any, context: Any) -> Any:  # type: ignore[override]
        return super().locate(request, context)


@pytest.fixture
def address() -> Iterator[str]:
    """A sync server's."""
    server = grpc.server(ThreadPoolExecutor(2), handlers=(service.generic_handler(Implementation().table()),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def on_aio(test: Any, table: Any = None) -> None:
    """Runs `test(channel)` against an aio server of its own."""

    async def run() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((service.generic_handler(table or AsyncImplementation().table()),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await test(channel)
        finally:
            await server.stop(None)

    asyncio.run(run())


def error_of(failed: Any) -> GraphKVError:
    return from_status(failed.code(), failed.details(), failed.trailing_metadata())


def test_a_sync_channel(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        got = list(service.multicallable(channel, service.SELECT)(iter([ask("a"), ask("b")]), timeout=30))
        assert [each.summary.request_id for each in got] == ["a", "b"]
        capabilities, located = (service.multicallable(channel, method)(UNARY[method], timeout=30) for method in UNARY)
        assert (capabilities.minor, located.replicas[0].replica) == (3, "g")
        with pytest.raises(grpc.RpcError) as caught:
            list(service.multicallable(channel, service.SELECT)(iter([ask("full")]), timeout=30))
    got = error_of(caught.value)
    assert (type(got), got.message, got.retry_after) == (OverloadedError, "no room for a layer — now", 0.25)


def test_an_aio_channel() -> None:
    async def test(channel: Any) -> None:
        got = [each async for each in service.multicallable(channel, service.SELECT)(iter([ask("a"), ask("b")]))]
        assert [each.summary.request_id for each in got] == ["a", "b"]
        capabilities, located = [await service.multicallable(channel, method)(UNARY[method]) for method in UNARY]
        assert (capabilities.minor, located.replicas[0].replica) == (3, "g")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [each async for each in service.multicallable(channel, service.SELECT)(iter([ask("full")]))]
        got = error_of(caught.value)
        assert (type(got), got.retry_after, got.request_id) == (OverloadedError, 0.25, "full")

    on_aio(test)


NO_MESSAGES = {"noise": b"\xff\xff\xff\xff", "cut": messages.write_request(end=messages.End(1, 2, 3)).SerializeToString()[:-1]}


@pytest.mark.parametrize("name", NO_MESSAGES)
def test_bytes_that_are_no_message_are_the_callers_mistake(name: str) -> None:
    async def test(channel: Any) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [each async for each in channel.stream_stream(service.SELECT.path)(iter([NO_MESSAGES[name]]))]
        got = error_of(caught.value)
        assert (type(got), got.reason, got.argument) == (InvalidInputError, Reason.BAD_LAYOUT, "request")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    on_aio(test)


def test_a_method_that_a_server_does_not_have() -> None:
    async def test(channel: Any) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.multicallable(channel, service.LOCATE)(pb.LocateRequest())
        assert error_of(caught.value).reason == Reason.UNKNOWN_NAME

    on_aio(test, {service.SELECT: AsyncImplementation().select})


def test_the_table_is_the_contracts() -> None:
    described = pb.DESCRIPTOR.pool.FindServiceByName(service.SERVICE)
    table = {method.name: (method.request.DESCRIPTOR, method.response.DESCRIPTOR) for method in service.METHODS}
    assert table == {method.name: (method.input_type, method.output_type) for method in described.methods}
    assert service.SELECT.path == "/graphkv.v1.Compression/Select"
