"""A service that breaks off the first sendings of a call after some answers, and lets the next through to a real server."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from graphkv_proto import service
from graphkv_proto.status import to_status

from graphkv.terms.errors import GraphKVError, UnavailableError
from graphkv_testing.stand_in import stand_in

__all__ = ["Breaks", "flaky"]


@dataclass
class Breaks:
    """`after`: for each sending that breaks, how many answers come first; `error`: what it breaks with; `sendings`: so far.

    A sending with None for its answers breaks at its first message. The client's own probes, of two tokens, do not count.
    """

    address: str = ""
    after: list[int | None] = field(default_factory=list)
    error: GraphKVError = field(default_factory=lambda: UnavailableError("gone"))
    sendings: int = 0


@contextmanager
def flaky(target: str, *, after: list[int | None] | None = None) -> Iterator[Breaks]:
    breaks = Breaks(after=after or [])
    with grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", -1)]) as channel:
        forward = service.multicallable(channel, service.SELECT)

        def select(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            first = next(requests)
            left: int | None = -1
            if first.header.prompts[0].tokens > 2:
                left = breaks.after[breaks.sendings] if breaks.sendings < len(breaks.after) else -1
                breaks.sendings += 1
            if left is None:
                broken(context)
            call = forward(itertools.chain([first], requests), timeout=context.time_remaining())
            for place, response in enumerate(call):
                if place == left:
                    call.cancel()
                    broken(context)
                yield response

        def broken(context: grpc.ServicerContext) -> None:
            code, message, trailing = to_status(breaks.error)
            context.set_trailing_metadata(trailing)
            context.abort(code, message)

        with stand_in(select) as address:
            breaks.address = address
            yield breaks
