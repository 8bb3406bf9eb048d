"""Real Ray clusters on this machine, and proof that nothing of them is left when they end."""

from collections.abc import Iterator

import pytest
from graphkv_testing.cluster import Cluster, serve_many, traces


@pytest.fixture(scope="session", autouse=True)
def clean() -> Iterator[None]:
    """No process, file or token of Ray's is left by all of these tests together."""
    before = traces()
    yield
    assert traces() == before


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """`graphkv-serve --ray --replicas 2`, ready."""
    with serve_many("--replicas", "2") as running:
        yield running
