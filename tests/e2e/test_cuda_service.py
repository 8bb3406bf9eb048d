"""A service on a GPU answers what `graphkv.select` answers there, whole or narrowed; runs where there is one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from graphkv_client import CompressClient, Policy
from graphkv_testing.cases import Case, Spec, seeded
from graphkv_testing.corners import corners
from graphkv_testing.process import Server, serve
from graphkv_testing.shaped import outputs_of, plain, shaped

import graphkv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SPECS = [*seeded(100, first=300), *corners(), *shaped()]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--device", "cuda:0") as running:
        yield running


def moved(inputs: dict[str, Any], kind: str) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.cuda() if kind == "cuda" else value.numpy()

    return {name: one(value) for name, value in inputs.items() if value is not None}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_a_gpu_replica_answers_as_in_process(spec: Spec, server: Server) -> None:
    case = Case(spec)
    inputs = {**case.inputs(), "outputs": outputs_of(case.policy, spec.seed)}
    wanted = plain(graphkv.select(**moved(inputs, "cuda")))
    with CompressClient(server.address) as client:
        assert plain(client.select(**moved(inputs, "cuda"))) == wanted
        if spec.dtype != "bf16":
            assert plain(client.select(**moved(inputs, "numpy"))) == wanted


def test_its_capabilities_name_the_gpu(server: Server) -> None:
    with CompressClient(server.address) as client:
        assert torch.cuda.get_device_name(0) in client.capabilities().device


def test_large_layers_through_pinned_memory(server: Server) -> None:
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((4, 8, 8192, 128), dtype=np.float32).astype(np.float16)
    queries = rng.standard_normal((4, 32, 32, 128), dtype=np.float32).astype(np.float16)
    wanted = graphkv.select(torch.from_numpy(keys).cuda(), queries=torch.from_numpy(queries).cuda(), policy=Policy(512))
    with CompressClient(server.address) as client:
        for _ in range(3):
            assert plain(client.select(keys, queries=queries, policy=Policy(512))) == plain(wanted)
    assert server.settled()
    assert server.metric("graphkv_in_flight_bytes") == 0
