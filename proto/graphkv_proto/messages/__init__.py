"""Plain values to messages and back: frozen dataclasses and the terms on one side, graphkv.v1 on the other.

`read_*` takes what a peer sent and trusts nothing of it: whatever is wrong becomes a typed error with the field's path, in
microseconds and before any memory is taken. `write_*` is its reverse, without loss.
"""

from graphkv_proto.messages.answer import read_layer, read_summary, write_layer, write_summary
from graphkv_proto.messages.capabilities import read_capabilities, write_capabilities, write_capabilities_request
from graphkv_proto.messages.header import FEATURES, MINOR, Header, Prompt, read_header, write_header
from graphkv_proto.messages.locate import Located, read_locate_response, write_locate_request
from graphkv_proto.messages.policy import read_policy, read_rope, write_policy, write_rope
from graphkv_proto.messages.tensor import (
    Descriptor,
    End,
    read_descriptor,
    read_end,
    write_chunk,
    write_descriptor,
    write_end,
    write_request,
)

__all__ = [
    "FEATURES",
    "MINOR",
    "Descriptor",
    "End",
    "Header",
    "Located",
    "Prompt",
    "read_capabilities",
    "read_descriptor",
    "read_end",
    "read_header",
    "read_layer",
    "read_locate_response",
    "read_policy",
    "read_rope",
    "read_summary",
    "write_capabilities",
    "write_capabilities_request",
    "write_chunk",
    "write_descriptor",
    "write_end",
    "write_header",
    "write_layer",
    "write_locate_request",
    "write_policy",
    "write_request",
    "write_rope",
    "write_summary",
]
