"""`graphkv-serve --ray`: starts or joins a Ray cluster, runs the application there, and takes down what it started.

A cluster of its own listens on the loopback alone, writes nothing into the home folder, and asks everybody for a token that
only its processes know: whoever can talk to Ray can run code as us. All of it ends with this process.

Ray's calls block, and its processes die with the thread that started them: they all have one thread that lives as long as
the process.
"""

import asyncio
import contextlib
import ctypes
import logging as loggers
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from graphkv_server import logs
from graphkv_server.config import Address, ServerConfig
from graphkv_server.listening import StartError
from graphkv_server.ray.blocking import BlockingCalls
from graphkv_server.ray.directory import PeerDirectory

__all__ = ["Cluster"]

_STORE_BYTES = 80 * 2**20
"""Ray's object store, the least it takes: no tensor passes through it."""
_LONGEST_FOLDER = 40
"""Characters of a folder below which Ray's sockets still have names that the system takes (107)."""
_START_TRIES = 3
"""Replicas that may fail to start before the settings are to blame."""
_STOP_SECONDS = 20.0
"""Seconds beyond the grace that Serve may take; without its controller or Ray's head it would never come back."""
_MOST_WATCHED = 256
_PR_SET_CHILD_SUBREAPER = 36


class Cluster:
    """The application in a Ray cluster: this process's own, or the one at `config.ray_address`."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._own = not config.ray_address
        self._folder: str | None = None
        self._calls = BlockingCalls("graphkv-ray")
        self._register: Any = None
        self.directory = PeerDirectory(self._read, most=_MOST_WATCHED)

    async def start(self) -> None:
        """Returns once every replica runs. StartError where they cannot."""
        sys.stdout = sys.stderr  # Ray prints what its workers print; standard output is for the ready line
        if self._own:
            _adopt_orphans()
        await self._calls.call(self._start)

    async def stop(self, hurry: asyncio.Event) -> bool:
        """Drains every replica, within the grace; then nothing of a cluster of our own is left. `hurry` ends the grace.

        Returns whether Ray ended by itself.
        """
        timeout = self._config.grace + _STOP_SECONDS
        stopping = asyncio.create_task(self._calls.call(self._stop))
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait((stopping, hurried), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        ended = stopping.done()
        hurried.cancel()
        if not ended:
            stopping.cancel()
            logs.event(
                "ray_left", level="error", text="Ray did not end in time; what is left of a cluster of our own is killed"
            )
        elif (error := stopping.exception()) is not None:
            logs.event("ray_failed", level="error", kind=type(error).__name__, text=str(error))
        if self._own:
            await asyncio.to_thread(_kill_children)
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
        return ended

    async def _read(self) -> Collection[str]:
        return [] if self._register is None else await self._register.read()

    def _start(self) -> None:
        try:
            import ray
            from ray import serve
        except ImportError as error:
            raise StartError(f"--ray needs Ray (pip install 'graphkv[server]'): {error}") from None
        from graphkv_server.ray.application import APPLICATION, Arguments, app
        from graphkv_server.ray.register import Register

        config = self._config
        logging: dict[str, Any] = {"configure_logging": False, "log_to_driver": True}
        try:
            if self._own:
                short = len(tempfile.gettempdir()) < _LONGEST_FOLDER
                self._folder = tempfile.mkdtemp(prefix="gkv-", dir=None if short else "/tmp")  # noqa: S108
                ray.init(
                    address="local",
                    num_cpus=_cpus(config),
                    num_gpus=None if config.replica_gpus else 0,
                    object_store_memory=_STORE_BYTES,
                    include_dashboard=False,
                    _temp_dir=self._folder,
                    **logging,
                )
                _check_gpus(config, ray.cluster_resources().get("GPU", 0.0))
                loggers.getLogger("ray.serve").setLevel(loggers.WARNING)
                serve.start(proxy_location="Disabled")
            else:
                ray.init(address=config.ray_address, **logging)
            self._register = Register(APPLICATION)
            serve.run(app(Arguments(**_arguments(config))), name=APPLICATION, route_prefix=None)
        except StartError:
            raise
        except Exception as error:  # Ray has no class of its own for what can go wrong here
            raise StartError(f"Ray cannot run the replicas: {error}") from error

    def _stop(self) -> None:
        import ray
        from ray import serve

        from graphkv_server.ray.application import APPLICATION

        if self._register is not None:
            self._register.close()
        if not ray.is_initialized():
            return
        if self._own:
            serve.shutdown()
        else:
            serve.delete(APPLICATION)
        ray.shutdown()


def _arguments(config: ServerConfig) -> dict[str, Any]:
    """The application's arguments: replicas listen where the front does, each on ports of its own."""
    unset = ServerConfig()
    settings: dict[str, Any] = {
        entry.name: value
        for entry in fields(config)
        if entry.metadata["group"] != "Many replicas" and (value := getattr(config, entry.name)) != getattr(unset, entry.name)
    }
    metrics = config.metrics_address
    settings["address"] = str(Address(config.address.host, 0))
    settings["metrics_address"] = "none" if metrics is None else str(Address(metrics.host, 0))
    return {
        "replicas": config.replicas,
        "max_replicas": config.max_replicas or None,
        "gpus": config.replica_gpus,
        "cpus": config.replica_cpus,
        "start_tries": _START_TRIES,
        "settings": settings,
    }


def _check_gpus(config: ServerConfig, there: float) -> None:
    """StartError where the machine has fewer GPUs than the replicas ask for: Ray would wait for more, for ever."""
    if config.replica_gpus * config.replicas > there + 1e-6:
        text = f"--replica-gpus is {config.replica_gpus:g} for {config.replicas} replicas, but Ray sees {there:g} GPUs here"
        raise StartError(text)


def _cpus(config: ServerConfig) -> int:
    """What Ray is told this machine has: room for every replica twice, as while one version replaces another."""
    most = max(config.replicas, config.max_replicas)
    return max(os.cpu_count() or 1, math.ceil(2 * most * config.replica_cpus) + 1)


def _adopt_orphans() -> None:
    """Processes whose parent ends before them become our children, so that none is forgotten; Linux alone knows how."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_children(seconds: float = 5.0) -> None:
    """Ends what is left of Ray's processes: all our children, and those that become it when their parents end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        children = _children()
        if not children:
            return
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


def _children() -> list[int]:
    found = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found
