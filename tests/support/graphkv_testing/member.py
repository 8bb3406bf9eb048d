"""A replica among others, without Ray: `python -m graphkv_testing.member FOLDER [flags of graphkv-serve]`.

Who serves is a folder with a file for each replica. A replica that dies leaves its file behind, until the test takes it away:
so a test says how fast the directory notices.
"""

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
from graphkv_server import config, logs
from graphkv_server.directory import Seat, least_loaded
from graphkv_server.replica import Replica
from graphkv_server.tuning import tune_process

from graphkv import __version__


class Listed:
    """The directory of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: Path | None = None

    def handlers(self) -> Sequence[grpc.GenericRpcHandler]:
        return ()

    async def join(self, seat: Callable[[], Seat]) -> None:
        own = seat()
        self._own = self._folder / f"{own.replica}.json"
        entry = {"replica": own.replica, "address": own.address, "pid": os.getpid(), "room": own.max_bytes_in_flight}
        written = self._own.with_suffix(".new")
        written.write_text(json.dumps(entry))
        written.rename(self._own)

    async def leave(self) -> None:
        if self._own is not None:
            self._own.unlink(missing_ok=True)

    def seats(self) -> list[Seat]:
        entries = []
        for path in self._folder.glob("*.json"):
            try:
                entries.append(json.loads(path.read_text()))
            except FileNotFoundError:
                continue
        return least_loaded((Seat(each["replica"], each["address"], 0, each["room"]) for each in entries), random.Random())

    async def locate(self, group: str, limit: int) -> list[Seat]:
        return self.seats()[: limit or None]


async def serve(settings: config.ServerConfig, folder: Path) -> None:
    directory = Listed(folder)
    replica = Replica(settings, directory=directory)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await replica.start()
    try:
        print(replica.ready_line(), flush=True)
        await stop.wait()
        await directory.leave()
        await replica.drain(settings.grace)
    finally:
        await replica.stop()


if __name__ == "__main__":
    options = config.from_arguments(sys.argv[2:], {}, version=__version__)
    logs.configure(options.log_level)
    tune_process()
    asyncio.run(serve(options, Path(sys.argv[1])))
