"""Capabilities as messages and back. Names of a newer server that are not known here are skipped: nobody can ask for them."""

from graphkv.terms.capabilities import Capabilities
from graphkv.terms.catalogue import OUTPUTS
from graphkv.terms.errors import InternalError
from graphkv_proto import v1 as pb
from graphkv_proto.messages import _names as names
from graphkv_proto.messages.header import MINOR

__all__ = ["read_capabilities", "write_capabilities", "write_capabilities_request"]


def write_capabilities_request() -> pb.GetCapabilitiesRequest:
    """Asks what a replica can do."""
    return pb.GetCapabilitiesRequest(minor=MINOR)


def write_capabilities(capabilities: Capabilities) -> pb.GetCapabilitiesResponse:
    """Raises InvalidInputError where a name is none of the contract."""
    listed = {field: [table.label(name, field) for name in getattr(capabilities, field)] for field, table in _LISTED.items()}
    return pb.GetCapabilitiesResponse(
        version=capabilities.version,
        minor=capabilities.protocol_minor,
        features=capabilities.features,
        max_bytes_in_flight=capabilities.max_bytes_in_flight,
        max_message_bytes=capabilities.max_message_bytes,
        chunk_bytes=capabilities.chunk_bytes,
        devices=[capabilities.device],
        replica=capabilities.replica,
        metrics_address=capabilities.metrics_address,
        outputs=[names.OUTPUT.label(name, "outputs") for name in OUTPUTS],  # all that `read_header` takes
        **listed,
    )


def read_capabilities(message: pb.GetCapabilitiesResponse) -> Capabilities:
    """Raises InternalError where a limit is not positive: nothing could be sent within it."""
    for name in ("max_bytes_in_flight", "max_message_bytes", "chunk_bytes"):
        if getattr(message, name) < 1:
            raise InternalError(f"the server's capabilities cannot be read: {name} is {getattr(message, name)}")
    return Capabilities(
        version=message.version,
        protocol_minor=message.minor,
        replica=message.replica,
        device=message.devices[0] if message.devices else "",
        max_bytes_in_flight=message.max_bytes_in_flight,
        max_message_bytes=message.max_message_bytes,
        chunk_bytes=message.chunk_bytes,
        metrics_address=message.metrics_address,
        features=tuple(message.features),
        **{field: table.known(getattr(message, field)) for field, table in _LISTED.items()},
    )


_LISTED = {
    "scorers": names.SCORER,
    "budget_allocations": names.BUDGET_ALLOCATION,
    "granularities": names.GRANULARITY,
    "signals": names.SIGNAL,
    "updates": names.UPDATE,
    "similarities": names.SIMILARITY,
    "encodings": names.ENCODING,
}
"""Fields of enums: the same names in the message and in Capabilities."""
