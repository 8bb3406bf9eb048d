"""graphkv-serve as a process of its own, for as long as the demo runs."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from graphkv_client import CompressClient, GraphKVError

from main_job.errors import DemoError
from main_job.progress import Progress

CALL_SECONDS = 600.0  # a call is open while the prefill runs, minutes on a busy machine


@contextlib.contextmanager
def service(address: str | None, progress: Progress) -> Iterator[str]:
    """The address of a service that answers: the one given, or of a process that ends with the block."""
    if address is None:
        with _process(progress) as started:
            yield started
    else:
        _ask(address)
        yield address


def _ask(address: str) -> None:
    try:
        with CompressClient(address, timeout=5.0) as client:
            client.ping()
    except GraphKVError as error:
        raise DemoError(f"no service answers at {address} ({error.reason}); start one with ./dev serve") from error


@contextlib.contextmanager
def _process(progress: Progress) -> Iterator[str]:
    """The address of a fresh server on a free port."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GRAPHKV_")}
    command = [sys.executable, "-m", "graphkv_server.cli", "--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"]
    with tempfile.TemporaryFile("w+") as log:
        # a session of its own: Ctrl-C reaches the demo alone, which then ends the server in its own order
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=own, start_new_session=True)
        try:
            with progress.step("service", "starting graphkv-serve"):
                line = process.stdout.readline() if process.stdout is not None else ""
            found = re.search(r"address=(\S+)", line)
            if found is None:
                log.seek(0)
                reason = (log.read().strip().splitlines() or ["it said nothing"])[-1]
                raise DemoError(f"graphkv-serve did not start: {reason}")
            yield found[1]
        finally:
            _end(process)


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
