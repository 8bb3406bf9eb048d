"""A real `graphkv-serve --ray`, or a Ray cluster of `ray start`, for tests: its replicas, their processes, and what is left."""

import contextlib
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from graphkv_proto import service
from graphkv_proto import v1 as pb

from graphkv_testing.process import Server, serve, wait_until

__all__ = ["Cluster", "free_of", "located", "processes", "serve_many", "traces"]

_RAY = re.compile(r"gcs_server|raylet|ray::|/ray/(dashboard|autoscaler|_private)/")


@dataclass(frozen=True)
class Process:
    """One process: `title` is its command line."""

    pid: int
    parent: int
    title: str


def processes() -> list[Process]:
    """All there are, but those that have ended and are only waited for."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            rest = (folder / "stat").read_text().rpartition(")")[2].split()
            if title and rest[0] != "Z":
                found.append(Process(int(folder.name), int(rest[1]), title))
    return found


def traces() -> dict[str, set[str]]:
    """What Ray could leave on this machine: processes, files of its sessions, shared memory, tokens in the home folder."""
    return {
        "processes": {f"{one.pid} {one.title[:60]}" for one in processes() if _RAY.search(one.title)},
        "files": {path.name for path in Path(tempfile.gettempdir()).glob("gkv-*")},
        "memory": {path.name for path in Path("/dev/shm").glob("plasma*")},
        "home": {path.name for path in Path.home().glob(".ray*")},
    }


def located(address: str, seconds: float = 5.0) -> dict[str, str]:
    """What Locate answers there: addresses by replica."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        answer = service.multicallable(channel, service.LOCATE)(pb.LocateRequest(), timeout=seconds)
    return {one.replica: one.address for one in answer.replicas}


@dataclass(frozen=True)
class Cluster:
    """`server`: the process that was started, which is the front."""

    server: Server

    @property
    def address(self) -> str:
        """The front's."""
        return self.server.address

    def located(self) -> dict[str, str]:
        """Addresses by replica, as the front names them."""
        return located(self.address)

    def has(self, number: int, seconds: float = 60.0) -> bool:
        """Waits until the front names so many replicas."""
        return wait_until(lambda: len(self.located()) == number, seconds)

    def descendants(self) -> list[Process]:
        """Every process below the front's."""
        known, everybody = {self.server.pid}, processes()
        found: list[Process] = []
        while more := [one for one in everybody if one.parent in known and one.pid not in known]:
            found += more
            known |= {one.pid for one in more}
        return found

    def pids(self, title: str) -> list[int]:
        """The processes below with this in their command line."""
        return [one.pid for one in self.descendants() if title in one.title]

    def replicas(self) -> list[int]:
        """The replicas' processes."""
        return self.pids("ray::ServeReplica")

    def kill(self, title: str, number: int = signal.SIGKILL) -> int:
        """Sends a signal to the first process with this in its command line; returns its id."""
        pid = self.pids(title)[0]
        os.kill(pid, number)
        return pid


@contextmanager
def serve_many(*flags: str, environment: dict[str, str] | None = None) -> Iterator[Cluster]:
    """`graphkv-serve --ray` on free ports; ended by SIGTERM, so that it takes its cluster down."""
    with serve("--ray", "--device", "cpu", *flags, environment=environment) as server:
        cluster = Cluster(server)
        try:
            yield cluster
        finally:
            if server.process.poll() is None:
                server.terminate()
                with contextlib.suppress(Exception):
                    server.wait(90)


def free_of(pids: list[int], seconds: float = 10.0) -> bool:
    """Waits until none of these processes is there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not {one.pid for one in processes()} & set(pids):
            return True
        time.sleep(0.1)
    return False
