"""The caller processes: started, counted while they call, and ended."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos_rooms.tally import Called

__all__ = ["Callers", "calling"]

_TESTS = Path(__file__).resolve().parents[2]


class Callers:
    """Those that write into `folder`."""

    def __init__(self, folder: Path, processes: "list[subprocess.Popen[bytes]]") -> None:
        self._folder = folder
        self._processes = processes

    @property
    def calls(self) -> list[Called]:
        """All calls that ended."""
        found = []
        for path in self._folder.glob("*.calls"):
            *lines, _ = path.read_text().split("\n")  # the last is empty, or half written
            found += [Called(path.stem, *json.loads(line)) for line in lines]
        return found

    @property
    def number(self) -> int:
        """Of those calls."""
        return sum(path.read_bytes().count(b"\n") for path in self._folder.glob("*.calls"))

    def lost(self) -> int:
        """Callers that ended before they were told to."""
        return sum(process.poll() is not None for process in self._processes)


@contextmanager
def calling(folder: Path, address: str, number: int, pause: float, timeout: float) -> Iterator[Callers]:
    """So many callers as long as the block lasts; each ends its last call."""
    path = os.pathsep.join((str(_TESTS / "benchmarks"), str(_TESTS / "support"), os.environ.get("PYTHONPATH", "")))
    program = [sys.executable, "-m", "chaos_rooms.caller", address]
    processes = []
    try:
        for caller in range(number):
            command = [*program, str(caller), str(folder), str(pause), str(timeout)]
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}))
        yield Callers(folder, processes)
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in processes:
            process.wait(timeout + 30)
    finally:
        for process in processes:
            process.kill()
            process.wait()
