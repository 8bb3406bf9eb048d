"""Two replicas that share one GPU: the same answers as in-process on it, and one of them is lost without anybody noticing."""

from typing import Any

import pytest
import torch
from graphkv_client import CompressClient
from graphkv_testing.cluster import serve_many

import graphkv
from graphkv import Policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def prompt(seed: int) -> dict[str, Any]:
    made = torch.Generator().manual_seed(seed)
    keys = torch.randn((4, 4, 3000, 64), generator=made).to("cuda", torch.bfloat16)
    queries = torch.randn((4, 8, 32, 64), generator=made).to("cuda", torch.bfloat16)
    return {"keys": keys, "queries": queries, "policy": Policy.paper(budget=128)}


def plain(selection: Any) -> list[list[list[int]]]:
    return [torch.as_tensor(layer.indices).tolist() for layer in selection.layers]


def test_two_replicas_share_a_gpu_and_one_is_killed() -> None:
    with serve_many("--replicas", "2", "--replica-gpus", "0.5", device="cuda") as cluster:
        assert f"device=cuda:0 {torch.cuda.get_device_name()}" in cluster.server.ready
        wanted = [plain(graphkv.select(**prompt(seed))) for seed in range(4)]
        seats = cluster.located()
        assert len(seats) == 2
        for name, address in seats.items():
            with CompressClient(address, locate=False) as client:
                capabilities = client.capabilities()
                assert capabilities.replica == name
                assert torch.cuda.get_device_name() in capabilities.device
                assert [plain(client.select(**prompt(seed))) for seed in range(4)] == wanted
        with CompressClient(cluster.address) as client:
            for number in range(40):
                if number == 10:
                    cluster.kill("ray::ServeReplica")
                assert plain(client.select(**prompt(number % 4))) == wanted[number % 4]
        assert cluster.has(2, 120), "it is replaced"
        cluster.server.terminate()
        assert cluster.server.wait(60) == 0
