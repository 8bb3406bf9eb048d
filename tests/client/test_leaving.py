"""Leaving a call waits for the message that is being made: nothing of ours runs on gRPC's thread afterwards."""

import threading
from collections.abc import Iterator
from typing import Any

from graphkv_client._exchange import Exchange


class Rpc:
    """A call whose messages are taken on a thread, as gRPC takes them."""

    def __init__(self, requests: Iterator[Any]) -> None:
        self.cancelled = False
        self.taken: list[Any] = []
        self.thread = threading.Thread(target=self._take, args=(requests,))
        self.thread.start()

    def _take(self, requests: Iterator[Any]) -> None:
        self.taken.extend(requests)

    def cancel(self) -> None:
        self.cancelled = True


def test_the_end_waits_for_the_message_in_the_making() -> None:
    making, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    made = []

    def requests() -> Iterator[int]:
        making.set()
        assert go_on.wait(60)
        made.append(1)
        yield 1
        made.append(2)
        yield 2

    exchange = Exchange(call=None)  # type: ignore[arg-type]  # no answer is folded here
    rpc = exchange.start(lambda messages, timeout: Rpc(messages), requests(), 1.0)
    assert isinstance(rpc, Rpc)
    assert making.wait(60)
    leaving = threading.Thread(target=lambda: (exchange.end(), ended.set()))
    leaving.start()
    while not rpc.cancelled:
        pass
    assert not ended.is_set()
    go_on.set()
    leaving.join(60)
    rpc.thread.join(60)
    assert ended.is_set()
    assert made == [1], "no message was begun after the end"


def test_an_error_in_the_making_ends_the_call() -> None:
    def requests() -> Iterator[int]:
        yield 1
        raise ValueError("no")

    exchange = Exchange(call=None)  # type: ignore[arg-type]
    rpc = exchange.start(lambda messages, timeout: Rpc(messages), requests(), 1.0)
    assert isinstance(rpc, Rpc)
    rpc.thread.join(60)
    assert rpc.taken == [1]
    assert isinstance(exchange.failure, ValueError)
    assert rpc.cancelled
