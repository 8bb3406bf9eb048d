"""PeerDirectory: replicas that know each other by asking each other, so that Locate needs neither Serve nor Ray's head.

Addresses come from a register (Ray's, which may be out of reach for a while: what was learned stays) and from the other
replicas' own answers. Every `PERIOD` each process asks those it watches how they are. Knows gRPC; nothing of Ray.
"""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import asdict
from typing import Any

import grpc
import grpc.aio

from graphkv_server import logs
from graphkv_server.directory import Seat
from graphkv_server.ray.watch import MOST, Watch

__all__ = ["CHANNEL_OPTIONS", "PERIOD", "PeerDirectory"]

PERIOD = 0.5
"""Seconds between two probes of one replica, and the time one may take: who is frozen is lost within 3 s."""
REGISTER_PERIOD = 2.0
"""Seconds between two looks into the register."""

CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # replicas are inside: no proxy of the environment stands between them
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # its default of two minutes would keep who is back out for as long
]

_SERVICE = "graphkv.internal.Peers"
_PROBE = "Probe"

Register = Callable[[], Awaitable[Collection[str]]]


class PeerDirectory:
    """`register`: asks for every address that replicas have put down; may fail or hang. `most`: how many are watched."""

    def __init__(self, register: Register, *, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._register = register
        self._most = most
        self._clock = clock
        self._watch = Watch("", clock, most=most)
        self._seat: Callable[[], Seat] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}

    def handlers(self) -> Sequence[grpc.GenericRpcHandler]:
        """The probe, as other replicas ask it."""
        handler: grpc.RpcMethodHandler[bytes, dict[str, Any]]
        handler = grpc.unary_unary_rpc_method_handler(self._answer, response_serializer=_to_json)
        return (grpc.method_handlers_generic_handler(_SERVICE, {_PROBE: handler}),)

    async def join(self, seat: Callable[[], Seat] | None = None) -> None:
        """Begins to watch; without a `seat` as one who only looks."""
        self._seat = seat
        self._watch = Watch(seat().address if seat else "", self._clock, most=self._most)
        for loop in (self._read_register(), self._ask_everybody()):
            task = asyncio.create_task(loop)
            self._tasks.add(task)

    async def leave(self) -> None:
        """Stops watching and closes every connection."""
        tasks = {*self._tasks, *self._probes.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._tasks.clear()
        self._probes.clear()
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        self._seat = None

    def seats(self) -> list[Seat]:
        """Who may be called, the least loaded first."""
        return self._watch.seats(self._seat() if self._seat else None)

    async def locate(self, group: str, limit: int) -> list[Seat]:
        """Who may be called; for a shard group the one that every replica names for it."""
        own = self._seat() if self._seat else None
        if group:
            for address in self._watch.ranked(group, own):
                if self._watch.unknown(address):
                    await self._probe(address)
                found = [seat for seat in self._watch.seats(own) if seat.address == address]
                if found:
                    return found
            return []
        seats = self.seats()
        return seats[:limit] if limit > 0 else seats

    def channel(self, address: str) -> grpc.aio.Channel:
        """The connection to a replica; kept for the next one who asks."""
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return self._channels[address]

    async def _answer(self, request: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> dict[str, Any]:
        if self._seat is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no replica is here")
            raise RuntimeError  # abort has raised
        return {"seat": asdict(self._seat()), "others": [seat.address for seat in self._watch.live()]}

    async def _read_register(self) -> None:
        while True:
            try:
                self._watch.learn(await self._register())
            except Exception as error:  # noqa: BLE001  # whatever the register says, what is known stays known
                logs.event("register_failed", level="warning", kind=type(error).__name__, text=str(error))
            for address in self._watch.forget():
                channel = self._channels.pop(address, None)
                if channel is not None:
                    await channel.close()
            await asyncio.sleep(REGISTER_PERIOD)

    async def _ask_everybody(self) -> None:
        spread = random.Random()  # noqa: S311  # spreads load, keeps no secret
        while True:
            for address in self._watch.to_probe():
                if address not in self._probes:
                    task = asyncio.create_task(self._probe(address))
                    self._probes[address] = task
                    task.add_done_callback(lambda _, address=address: self._probes.pop(address, None))  # type: ignore[misc]
            await asyncio.sleep(PERIOD * spread.uniform(0.9, 1.0))

    async def _probe(self, address: str) -> None:
        ask: Any = self.channel(address).unary_unary(f"/{_SERVICE}/{_PROBE}", response_deserializer=json.loads)
        try:
            answer = await ask(b"", timeout=PERIOD)
            seat = Seat(**answer["seat"])
            others = [str(other) for other in answer["others"]]
            if seat.address != address:
                raise ValueError(seat.address)
        except grpc.aio.AioRpcError as error:
            self._watch.failed(address, refused=error.code() is grpc.StatusCode.UNAVAILABLE)
        except (ValueError, TypeError, KeyError) as error:  # somebody else listens there now
            self._watch.failed(address, refused=True)
            logs.event("strange_peer", level="warning", address=address, kind=type(error).__name__)
        else:
            self._watch.answered(address, seat, others)


def _to_json(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode()
