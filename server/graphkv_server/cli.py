"""graphkv-serve: one replica in this process, or many under Ray, from its settings to its exit code.

Exit codes: 0 after a drain, 2 where a setting, an address or the device cannot be used, 130 after Ctrl-C before it was up.
Prints one line on standard output when it is ready; everything else goes to the logs on standard error.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from graphkv import __version__
from graphkv_server import config, logs
from graphkv_server.config import ConfigError, ServerConfig
from graphkv_server.ray import environment
from graphkv_server.tuning import tune_process

if TYPE_CHECKING:
    from graphkv_server.ray.cluster import Cluster
    from graphkv_server.ray.front import Front

__all__ = ["main"]

_USAGE = 2
_INTERRUPTED = 130  # what a shell reports for SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code."""
    try:
        settings = config.from_arguments(sys.argv[1:] if arguments is None else arguments, os.environ, version=__version__)
    except ConfigError as error:
        return _refuse(str(error))
    logs.configure(settings.log_level)
    try:
        tune_process()
        if settings.ray:
            environment.prepare(os.environ, own=not settings.ray_address)
        # torch and Ray take seconds to load: --help and bad settings should not wait for them.
        from graphkv_server.listening import StartError

        try:
            return asyncio.run(_serve_many(settings) if settings.ray else _serve(settings))
        except StartError as error:
            return _refuse(str(error))
    except KeyboardInterrupt:  # only until the signals' handlers are there
        return _INTERRUPTED


async def _serve(settings: ServerConfig) -> int:
    from graphkv_server.replica import Replica

    replica = Replica(settings)
    stop, hurry = asyncio.Event(), asyncio.Event()
    _take_signals(stop, hurry)
    await replica.start()
    try:
        print(replica.ready_line(), flush=True)
        await stop.wait()
        await replica.drain(settings.grace, hurry)
    finally:
        await replica.stop()
    return 0


async def _serve_many(settings: ServerConfig) -> int:
    from graphkv_server.ray.cluster import Cluster
    from graphkv_server.ray.front import Front

    stop, hurry = asyncio.Event(), asyncio.Event()
    _take_signals(stop, hurry)
    cluster = Cluster(settings)
    front = Front(settings, cluster.directory)
    await front.start()
    line = sys.stdout
    ended = True
    try:
        if await _unless(stop, _ready(cluster, front, settings)):
            _take_signals(stop, hurry)  # Ray has taken them for itself
            print(await front.ready_line(), file=line, flush=True)
            await stop.wait()
    finally:
        await front.drain()
        ended = await cluster.stop(hurry)
        await front.stop()
    if not ended:
        logging.shutdown()
        os._exit(0)  # Ray's own last steps wait for processes that do not answer any more
    return 0


async def _ready(cluster: "Cluster", front: "Front", settings: ServerConfig) -> None:
    await cluster.start()
    await front.seats(settings.replicas)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether the work was done before the signal to stop came."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        working.cancel()
        stopping.cancel()


def _take_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """The first SIGTERM or SIGINT sets `stop`, the next `hurry`."""
    loop = asyncio.get_running_loop()

    def signalled(number: int) -> None:
        logs.event("signal", signal=signal.Signals(number).name, again=stop.is_set())
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled, number)


def _refuse(message: str) -> int:
    print(f"graphkv-serve: {message}", file=sys.stderr)
    return _USAGE


if __name__ == "__main__":
    sys.exit(main())
