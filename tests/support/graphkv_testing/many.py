"""Many replicas under Ray in the place of one server, for tests that know one server only."""

import json
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from graphkv_testing.cluster import serve_many
from graphkv_testing.process import Server

__all__ = ["as_one_server"]


class _Many(Server):
    """Its address is the front's, its metrics are the sums of all replicas'."""

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        with urllib.request.urlopen(f"http://{self.metrics_address}/sd", timeout=10) as answer:
            groups = json.load(answer)
        found: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        for target in (target for group in groups for target in group["targets"]):
            found.update(replace(_one(self), metrics_address=target).metrics())
        return dict(found)


def _one(server: Server) -> Server:
    return Server(server.process, server.address, server.metrics_address, server.ready, server.lines)


@contextmanager
def as_one_server(replicas: int) -> Iterator[Server]:
    """`graphkv-serve --ray` with so many replicas."""
    with serve_many("--replicas", str(replicas)) as cluster:
        own = cluster.server
        yield _Many(own.process, own.address, own.metrics_address, own.ready, own.lines)
