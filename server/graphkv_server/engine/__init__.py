"""The engine: whole layers in, chosen tokens out, computed in batches by one thread on one device."""

from graphkv_server.engine.engine import Engine
from graphkv_server.engine.job import Job

__all__ = ["Engine", "Job"]
