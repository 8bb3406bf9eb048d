"""Several real server processes that know each other (see `member`), to be killed, frozen, drained and replaced."""

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from graphkv_testing.process import Server, serve

__all__ = ["Fleet", "fleet"]

_SUPPORT = Path(__file__).resolve().parents[1]


class Fleet:
    """`members`: all that were started, dead ones too."""

    def __init__(self, folder: Path, stack: ExitStack, flags: tuple[str, ...]) -> None:
        self._folder = folder
        self._stack = stack
        self._flags = flags
        self.members: list[Server] = []

    def start(self, *flags: str) -> Server:
        """One more replica, listed."""
        return self.start_all(1, *flags)[0]

    def start_all(self, count: int, *flags: str) -> list[Server]:
        """So many more, at once."""
        path = os.pathsep.join(filter(None, (str(_SUPPORT), os.environ.get("PYTHONPATH", ""))))
        program = ("-m", "graphkv_testing.member", str(self._folder))

        def started(number: int) -> Server:
            context = serve(*self._flags, *flags, program=program, environment={"PYTHONPATH": path})
            server = context.__enter__()
            self._stack.push(context)
            return server

        with ThreadPoolExecutor(count) as pool:
            servers = list(pool.map(started, range(count)))
        self.members += servers
        return servers

    def unlist(self, server: Server) -> str:
        """The directory notices that it is gone; returns what brings it back."""
        path = self._file(server)
        text = path.read_text()
        path.unlink()
        return text

    def claim(self, replica: str, address: str) -> None:
        """The directory names somebody who is not there."""
        self.relist(json.dumps({"replica": replica, "address": address, "pid": 0, "room": 1}))

    def relist(self, text: str) -> None:
        """The directory notices that it is back."""
        (self._folder / f"{json.loads(text)['replica']}.json").write_text(text)

    def name(self, server: Server) -> str:
        """What its answers call it."""
        return str(json.loads(self._file(server).read_text())["replica"])

    def kill(self, server: Server) -> None:
        """SIGKILL; the directory has not noticed."""
        server.terminate(signal.SIGKILL)
        server.wait()

    def freeze(self, server: Server) -> None:
        """SIGSTOP."""
        server.terminate(signal.SIGSTOP)

    def thaw(self, server: Server) -> None:
        """SIGCONT."""
        server.terminate(signal.SIGCONT)

    def attempts(self) -> int:
        """Select calls that the living replicas have seen, however they ended."""
        return int(sum(sum(server.outcomes().values()) for server in self.members if server.process.poll() is None))

    def _file(self, server: Server) -> Path:
        for path in self._folder.glob("*.json"):
            if json.loads(path.read_text())["pid"] == server.pid:
                return path
        raise KeyError(server.address)


@contextmanager
def fleet(count: int, *flags: str) -> Iterator[Fleet]:
    """`count` replicas with these flags; all killed at the end."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        own = Fleet(Path(folder), stack, ("--threads", "1", "--device", "cpu", *flags))
        own.start_all(count)
        yield own
