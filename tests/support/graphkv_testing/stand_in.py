"""A service that does what a test tells it to: hang, lie, answer late. Behind a real socket, at the client's own seam."""

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from graphkv_proto import messages, service
from graphkv_proto import v1 as pb
from graphkv_proto.messages import Header

from graphkv.terms.selection import LayerSelection, Summary

__all__ = ["Seen", "answer", "end_of", "stand_in"]


@dataclass
class Seen:
    """What the service was sent: `header`, the `layers` whose first tensor came, in order, and whether `end` did."""

    header: Header | None = None
    layers: list[tuple[int, int]] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    messages: int = 0
    ended: bool = False

    def take(self, message: pb.SelectRequest) -> None:
        self.messages += 1
        if message.HasField("header"):
            self.header = messages.read_header(message.header)
        for described in map(messages.read_descriptor, message.descriptors):
            self.roles.append(described.role)
            if (described.prompt, described.layer) not in self.layers:
                self.layers.append((described.prompt, described.layer))
        self.ended |= message.HasField("end")


def answer(header: Header, layer: int, *, prompt: int = 0, **changes: Any) -> pb.SelectResponse:
    """The first `budget` tokens of every KV head."""
    fields = {
        "layer": layer,
        "prompt": prompt,
        "indices": np.tile(np.arange(header.policy.budget, dtype=np.int32), (header.kv_heads, 1)),
        "num_tokens": header.prompts[prompt].tokens,
        "kept_score_ratio": 0.5,
        "changed": 0,
        "importance": "snapkv",
        "fingerprint": header.policy.fingerprint,
    }
    return pb.SelectResponse(layers=[messages.write_layer(LayerSelection(**{**fields, **changes}))])


def end_of(header: Header) -> pb.SelectResponse:
    """The last message of an answer."""
    summary = Summary(header.request_id, transport="tcp", where="stand-in", seconds={"compute": 0.25})
    return pb.SelectResponse(summary=messages.write_summary(summary))


@contextmanager
def stand_in(
    select: Callable[[Iterator[pb.SelectRequest], grpc.ServicerContext], Iterator[pb.SelectResponse]],
) -> Iterator[str]:
    """The address of a service whose Select is this function."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((service.generic_handler({service.SELECT: select}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
