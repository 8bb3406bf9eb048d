"""The Serve application with a seam: the engine of a replica whose process id names a file in CHAOS_FOLDER stands still.

Serve imports it in the replica's process; the replica's port, its health and its directory go on as they are.
"""

import os
import time
from pathlib import Path
from typing import Any

from graphkv_server.ray import application
from graphkv_server.ray.deployment import ServedReplica
from ray.serve import Application

__all__ = ["HangingReplica", "app", "hang_file"]


def hang_file(folder: Path, pid: int) -> Path:
    """The file that holds the engine of a process as long as it exists."""
    return folder / f"{pid}.hang"


class HangingReplica(ServedReplica):
    """ServedReplica, whose selections wait as long as there is such a file."""

    async def __init__(self, settings: Any, cpus: float) -> None:  # type: ignore[misc]
        await super().__init__(settings, cpus)  # type: ignore[misc]
        engine = self._replica._engine
        held, select = hang_file(Path(os.environ["CHAOS_FOLDER"]), os.getpid()), engine._select

        def waiting(work: Any) -> Any:
            while held.exists():
                time.sleep(0.05)
            return select(work)

        engine._select = waiting


def app(args: application.Arguments) -> Application:
    """What Serve runs: `graphkv_server.ray:app` around the other class."""
    application.ServedReplica = HangingReplica  # type: ignore[misc]
    return application.app(args)
