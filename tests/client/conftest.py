"""One real server process for all tests of the client, and prompts small enough for two cores.

With REPLICAS=2 in the environment it is `graphkv-serve --ray` with so many replicas, which the tests reach through Locate.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from graphkv_client import CompressClient
from graphkv_testing.process import Server, serve


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    if replicas := int(os.environ.get("REPLICAS", "0")):
        from graphkv_testing.many import as_one_server

        with as_one_server(replicas) as many:
            yield many
        return
    with serve() as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[CompressClient]:
    with CompressClient(server.address) as own:
        yield own


@pytest.fixture
def prompt() -> dict[str, Any]:
    """Keys [2, 3, 201, 16] and queries [2, 6, 32, 16], numpy float32."""
    rng = np.random.default_rng(7)
    return {
        "keys": rng.standard_normal((2, 3, 201, 16), dtype=np.float32),
        "queries": rng.standard_normal((2, 6, 32, 16), dtype=np.float32),
    }
