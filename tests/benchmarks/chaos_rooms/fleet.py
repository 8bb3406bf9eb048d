"""The replicas of a run: the Serve application in a real Ray cluster on this machine; who is named, and which process that is."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import grpc
from graphkv_testing.cluster import Head, below_of, free_port, located, ray_head

__all__ = ["ServedFleet", "ray_head"]

_REPLICA = "ray::ServeReplica"
_APPLICATION = "graphkv"


class ServedFleet:
    """The application in the cluster of `head`. `address`: what callers are given, the gRPC port of Serve's proxy."""

    def __init__(self, head: Head, grace: float) -> None:
        self._head = head
        self._grace = grace
        self._ports = (free_port(), free_port())
        self._known: dict[str, str] = {}
        self.address = f"127.0.0.1:{self._ports[1]}"

    def deploy(self, replicas: int, **settings: Any) -> None:
        """Tells Serve what should run."""
        own = {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0", "device": "cpu", "grace": self._grace}
        args = {"replicas": replicas, "cpus": 0.5, "start_tries": 2 if "device" in settings else 20, "settings": own | settings}
        http, own_grpc = self._ports
        self._head.deploy(
            {
                "proxy_location": "EveryNode",
                "http_options": {"host": "127.0.0.1", "port": http},
                "grpc_options": {"port": own_grpc, "grpc_servicer_functions": ["graphkv_server.ray:add_compression"]},
                "applications": [
                    {
                        "name": _APPLICATION,
                        "route_prefix": "/graphkv",
                        "import_path": "chaos_rooms.hanging:app",
                        "args": args,
                    }
                ],
            }
        )

    def status(self) -> str:
        """What Serve says of the application."""
        return self._head.status(_APPLICATION)

    def named(self, without: frozenset[str] | set[str] = frozenset()) -> dict[str, str]:
        """Addresses by replica, as the first that answers tells; `without`: replicas that are not asked, being dead or frozen."""
        asked = [self.address, *(address for name, address in self._known.items() if name not in without)]
        for address in asked:
            try:
                found = located(address, 1.0)
            except grpc.RpcError:
                continue
            self._known |= found
            return found
        return {}

    def pids(self, title: str = _REPLICA) -> list[int]:
        """Processes of the cluster with this in their command line."""
        return [one.pid for one in below_of(self._head.process.pid) if title in one.title]

    def processes(self) -> dict[str, int]:
        """Process ids by name, of the replicas that are named."""
        ports = {address.rpartition(":")[2]: name for name, address in self.named().items()}
        found = {}
        for pid in self.pids():
            for port in listening(pid):
                if str(port) in ports:
                    found[ports[str(port)]] = pid
        return found

    def head_dies(self) -> int:
        """Kills Ray's head (GCS) alone: `ray start` would end the whole cluster for it, so it is stopped first."""
        self._head.process.send_signal(signal.SIGSTOP)
        (pid,) = self.pids("gcs_server")
        os.kill(pid, signal.SIGKILL)
        return pid


def listening(pid: int) -> set[int]:
    """The TCP ports that a process listens on."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            inodes.add(os.readlink(entry))
        except OSError:
            continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(int(fields[1].rpartition(":")[2], 16))
    return found


def waited(condition: Any, seconds: float, pause: float = 0.2) -> float | None:
    """Seconds until the condition held; None where it did not in time."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            return None
        time.sleep(pause)
    return time.monotonic() - start
