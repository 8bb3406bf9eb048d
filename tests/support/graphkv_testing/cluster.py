"""A real `graphkv-serve --ray`, or a Ray cluster of `ray start`, for tests: its replicas, their processes, and what is left."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from graphkv_proto import service
from graphkv_proto import v1 as pb
from graphkv_server.ray.environment import prepare

from graphkv_testing.process import Server, serve, wait_until

__all__ = ["Cluster", "Head", "free_of", "located", "processes", "ray_head", "serve_many", "traces"]

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


def below_of(pid: int) -> list[Process]:
    """The children of a process, their children, and so on."""
    known, everybody = {pid}, processes()
    found: list[Process] = []
    while more := [one for one in everybody if one.parent in known and one.pid not in known]:
        found += more
        known |= {one.pid for one in more}
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
        return below_of(self.server.pid)

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


@dataclass(frozen=True)
class Head:
    """A Ray cluster of `ray start --head` on this machine. `environment`: what programs that talk to it need."""

    process: "subprocess.Popen[bytes]"
    environment: dict[str, str]
    folder: Path

    def serve(self, *arguments: str) -> str:
        """Runs Serve's command line tool; what it printed."""
        command = [str(Path(sys.executable).with_name("serve")), *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=100, check=False)
        if done.returncode:
            raise RuntimeError(f"serve {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def deploy(self, config: object) -> None:
        """`serve deploy` of a config, which JSON can write."""
        path = self.folder / "config.yaml"
        path.write_text(json.dumps(config))
        self.serve("deploy", "--address", self.environment["RAY_DASHBOARD_ADDRESS"], str(path))

    def status(self, application: str = "graphkv") -> str:
        """What `serve status` says of the application: RUNNING, DEPLOYING, DEPLOY_FAILED..."""
        found = re.search(rf"^  {application}:\n    status: (\w+)", self.told(), re.MULTILINE)
        return found[1] if found else ""

    def told(self) -> str:
        """All that `serve status` says."""
        return self.serve("status", "--address", self.environment["RAY_DASHBOARD_ADDRESS"])

    def runs(self, seconds: float = 200.0) -> None:
        """Waits until the application runs; RuntimeError with what Serve says where it does not."""
        if not wait_until(lambda: self.status() == "RUNNING", seconds):
            raise RuntimeError(self.told())


@contextmanager
def ray_head(cpus: int = 8) -> Iterator[Head]:
    """A cluster without replicas, on the loopback, with a token that only its environment holds."""
    folder = Path(tempfile.mkdtemp(prefix="gkv-", dir="/tmp"))
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GRAPHKV_", "RAY_"))}
    prepare(environment, own=True)
    environment["RAY_DASHBOARD_ADDRESS"] = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port=0", "--num-gpus=0"]
    command += [f"--num-cpus={cpus}", f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    command += ["--include-dashboard=true", "--disable-usage-stats", f"--object-store-memory={80 * 2**20}"]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        current = folder / "ray_current_cluster"
        wait_until(
            lambda: (_says(folder / "output", "Ray runtime started") and current.exists()) or process.poll() is not None, 90
        )
        if not current.exists():
            raise RuntimeError(f"ray start: {(folder / 'output').read_text(errors='replace')[-3000:]}")
        environment["RAY_ADDRESS"] = current.read_text().strip()
        yield Head(process, environment, folder)
    finally:
        below = [one.pid for one in below_of(process.pid)]
        for pid in (process.pid, *below):  # `ray start --block` leaves them, and takes half a minute for it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        free_of(below, 20)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def _says(path: Path, text: str) -> bool:
    return text in path.read_text(errors="replace")


@contextmanager
def serve_many(*flags: str, device: str = "cpu") -> Iterator[Cluster]:
    """`graphkv-serve --ray` on free ports; ended by SIGTERM, so that it takes its cluster down."""
    with serve("--ray", "--device", device, *flags) as server:
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
