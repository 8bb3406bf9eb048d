"""graphkv-serve: one replica in this process, from its settings to its exit code.

Exit codes: 0 after a drain, 2 where a setting, an address or the device cannot be used, 130 after Ctrl-C before it was up.
Prints one line on standard output when it is ready; everything else goes to the logs on standard error.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from graphkv import __version__
from graphkv_server import config, logs
from graphkv_server.config import ConfigError, ServerConfig
from graphkv_server.tuning import tune_process

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
        # torch takes seconds to load: --help and bad settings should not wait for it.
        from graphkv_server.replica import StartError

        try:
            return asyncio.run(_serve(settings))
        except StartError as error:
            return _refuse(str(error))
    except KeyboardInterrupt:  # only until the signals' handlers are there
        return _INTERRUPTED


async def _serve(settings: ServerConfig) -> int:
    from graphkv_server.replica import Replica

    replica = Replica(settings)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    hurry = asyncio.Event()

    def signalled(number: int) -> None:
        logs.event("signal", signal=signal.Signals(number).name, again=stop.is_set())
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled, number)
    await replica.start()
    try:
        print(replica.ready_line(), flush=True)
        await stop.wait()
        await replica.drain(settings.grace, hurry)
    finally:
        await replica.stop()
    return 0


def _refuse(message: str) -> int:
    print(f"graphkv-serve: {message}", file=sys.stderr)
    return _USAGE


if __name__ == "__main__":
    sys.exit(main())
