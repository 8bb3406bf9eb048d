"""A real `graphkv-serve` process on free ports, for tests that talk to a server as callers do."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Server", "serve", "wait_until"]

_START_SECONDS = 60.0
_SETTLE_SECONDS = 20.0


def wait_until(condition: object, seconds: float = _SETTLE_SECONDS) -> bool:
    """Polls `condition()` until it is true; False where it never was within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@dataclass
class Server:
    """A running server. `address`, `metrics_address`: host:port, the real ones; `lines`: what it logged so far."""

    process: "subprocess.Popen[str]"
    address: str
    metrics_address: str
    ready: str
    lines: list[str] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample, by name and sorted labels."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        families = text_string_to_metric_families(text)
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels; 0 where there are none."""
        wanted = set(labels.items())
        return sum(value for (given, own), value in self.metrics().items() if given == name and wanted <= set(own))

    def outcomes(self, method: str = "Select") -> dict[str, float]:
        """How many calls ended how."""
        return {
            dict(labels)["reason"]: value
            for (name, labels), value in self.metrics().items()
            if name == "graphkv_requests_total" and dict(labels)["method"] == method
        }

    def settled(self) -> bool:
        """Waits until no call is open and no byte in flight; False where that does not come."""
        return wait_until(
            lambda: self.metric("graphkv_in_flight_bytes") == 0 and self.metric("graphkv_in_flight_requests") == 0
        )

    def rss(self) -> int:
        """Resident bytes now."""
        return _status(self.pid, "VmRSS")

    def peak_rss(self) -> int:
        """The most resident bytes so far."""
        return _status(self.pid, "VmHWM")

    def terminate(self, number: int = signal.SIGTERM) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    def wait(self, seconds: float = _SETTLE_SECONDS) -> int:
        """The exit code, once it has one."""
        return self.process.wait(seconds)


@contextmanager
def serve(
    *flags: str, environment: dict[str, str] | None = None, program: Sequence[str] = ("-m", "graphkv_server.cli")
) -> Iterator[Server]:
    """A server on free ports, ready; killed and reaped at the end. The caller's own GRAPHKV_ variables do not reach it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GRAPHKV_")}
    own |= {"PYTHONUNBUFFERED": "1", **(environment or {})}
    command = [
        sys.executable,
        *program,
        "--address",
        "127.0.0.1:0",
        "--metrics-address",
        "127.0.0.1:0",
        *flags,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own)
    lines: list[str] = []
    threads: list[threading.Thread] = []
    try:
        ready: queue.Queue[str] = queue.Queue()
        for stream, put in ((process.stdout, ready.put), (process.stderr, lines.append)):
            threads.append(threading.Thread(target=_read, args=(stream, put), daemon=True))
            threads[-1].start()
        line = ready.get(timeout=_START_SECONDS)
        found = re.search(r"ready: address=(\S+) metrics=(\S+) device=", line)
        if found is None:
            raise RuntimeError(f"graphkv-serve did not start: {line!r} {' '.join(lines)}")
        yield Server(process, found[1], found[2], line, lines)
    finally:
        process.kill()
        process.wait()
        for thread in threads:
            thread.join()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _read(stream: object, put: object) -> None:
    for line in stream:  # type: ignore[attr-defined]
        put(line.rstrip("\n"))  # type: ignore[operator]
    put("")  # type: ignore[operator]  # the end, for who waits for a line that never comes


def _status(pid: int, name: str) -> int:
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(name)
