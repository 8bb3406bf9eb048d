"""The light client: what importing and using it brings into a process, and what it never does."""

import inspect
import subprocess
import sys

import graphkv_client
from graphkv_testing.process import Server

HEAVY = {"torch", "ray", "triton", "transformers", "prometheus_client", "graphkv_server", "graphkv.algorithm", "graphkv.layer"}
USE = """
import sys
import numpy as np
import graphkv_client
from graphkv_client import CompressClient, Policy

heavy = set(sys.argv[2].split(","))
assert not heavy & set(sys.modules), heavy & set(sys.modules)
rng = np.random.default_rng(0)
keys, queries = rng.standard_normal((2, 2, 65, 8)), rng.standard_normal((2, 4, 32, 8))
with CompressClient(sys.argv[1]) as client:
    kept = client.select(keys, queries=queries, policy=Policy(40))
    with client.stream(num_layers=2, num_tokens=65, policy=Policy(40)) as stream:
        for layer in range(2):
            stream.put(layer, keys=keys[layer, :, 30:], queries=queries[layer], start=30, copy=True)
            stream.put(layer, keys=keys[layer, :, :30], start=0)
        for selection in stream:
            assert (selection.indices == kept.indices[selection.layer]).all()
assert not heavy & set(sys.modules), heavy & set(sys.modules)
print("light")
"""


def test_numpy_brings_in_nothing_heavy(server: Server) -> None:
    command = [sys.executable, "-c", USE, server.address, ",".join(sorted(HEAVY))]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.stdout == "light\n", run.stderr


def test_no_type_of_a_library_in_a_public_signature() -> None:
    for name in graphkv_client.__all__:
        for method, value in inspect.getmembers(getattr(graphkv_client, name), inspect.isfunction):
            if not method.startswith("_") or method == "__init__":
                text = str(inspect.signature(value))
                assert not any(word in text for word in ("pb2", "protobuf", "grpc", "torch", "ndarray")), (name, method, text)
