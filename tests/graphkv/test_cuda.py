"""The same cases on a GPU, judged by the same rule; runs where there is one."""

from typing import Any

import pytest
import torch
from graphkv_testing.cases import Case, Spec, seeded
from graphkv_testing.corners import corners
from graphkv_testing.rule import judge_selection

import graphkv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SPECS = [*seeded(220), *corners()]


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_a_gpu_chooses_right(spec: Spec) -> None:
    case = Case(spec)
    answer = graphkv.select(**on_gpu(case.inputs()))
    assert isinstance(answer, graphkv.Selection)
    for rows in answer.indices:
        for row in rows:
            assert row.device.type == "cuda"
            assert row.dtype == torch.int32
    for verdict in judge_selection(case.states(), answer):
        assert verdict.ok, verdict.describe()


@pytest.mark.parametrize("setting", ["high", "highest"])
def test_no_setting_of_the_process_reaches_the_cosines(setting: str) -> None:
    """TF32 would change a cosine in its fourth digit, and with it which tokens are neighbors."""
    torch.manual_seed(0)
    keys, queries = torch.randn(2, 4, 2000, 64, device="cuda"), torch.randn(2, 8, 32, 64, device="cuda")
    policy = graphkv.Policy.paper(128)
    wanted = graphkv.select(keys, queries=queries, policy=policy)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        given = graphkv.select(keys, queries=queries, policy=policy)
    finally:
        torch.set_float32_matmul_precision(before)
    for own, right in zip(given.indices, wanted.indices, strict=True):
        assert torch.equal(own, right)
