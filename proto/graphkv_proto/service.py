"""The RPC table: what each method of graphkv.v1.Compression is called and how its messages are written, for both ends.

Used instead of generated stubs: one table serves sync and aio channels, and the server. Knows no message's content.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from graphkv.terms.errors import InvalidInputError, Reason
from graphkv_proto import v1 as pb

__all__ = ["GET_CAPABILITIES", "LOCATE", "METHODS", "SELECT", "SERVICE", "Method", "generic_handler", "multicallable"]

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

SERVICE = "graphkv.v1.Compression"


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Response]):
    """One RPC. `streaming`: messages flow both ways, else one goes up and one comes back."""

    name: str
    request: type[Request]
    response: type[Response]
    streaming: bool = False

    @property
    def path(self) -> str:
        """As HTTP/2 carries it."""
        return f"/{SERVICE}/{self.name}"


SELECT = Method("Select", pb.SelectRequest, pb.SelectResponse, streaming=True)
GET_CAPABILITIES = Method("GetCapabilities", pb.GetCapabilitiesRequest, pb.GetCapabilitiesResponse)
LOCATE = Method("Locate", pb.LocateRequest, pb.LocateResponse)
METHODS: tuple[Method[Any, Any], ...] = (SELECT, GET_CAPABILITIES, LOCATE)


def multicallable(channel: Any, method: Method[Any, Any]) -> Any:
    """What calls the method on this channel: grpc's or grpc.aio's own multicallable, as the channel is."""
    connect = channel.stream_stream if method.streaming else channel.unary_unary
    return connect(
        method.path, request_serializer=method.request.SerializeToString, response_deserializer=method.response.FromString
    )


def generic_handler(implementations: Mapping[Method[Any, Any], Callable[..., Any]]) -> grpc.GenericRpcHandler:
    """The handler of a server that implements these methods; those left out answer UNIMPLEMENTED.

    Bytes that are no message raise InvalidInputError where the implementation reads its requests; in a unary method,
    which reads nothing, they end the call before it.
    """
    handlers = {}
    for method, implementation in implementations.items():
        make = grpc.stream_stream_rpc_method_handler if method.streaming else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = make(
            implementation,
            request_deserializer=_reader(method.request),
            response_serializer=method.response.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _reader(kind: type[Request]) -> Callable[[bytes], Request]:
    def read(data: bytes) -> Request:
        try:
            return kind.FromString(data)
        except DecodeError:
            message = f"{len(data)} bytes are no {kind.DESCRIPTOR.full_name}"
            raise InvalidInputError(message, argument="request", reason=Reason.BAD_LAYOUT) from None

    return read
