"""Every scorer of the catalogue through a real server, in every way a call can be made: one answer."""

from collections.abc import Iterator
from typing import Any

import pytest
from graphkv_client import CompressClient
from graphkv_testing.every_scorer import LAYERS, policy_of, prompt_for
from graphkv_testing.process import serve
from graphkv_testing.shaped import outputs_of, plain

import graphkv
from graphkv.terms.catalogue import SCORERS

RANGED = ("keys", "scores", "values")
HEADED = ("keys", "queries", "values")
SHAPES: dict[str, dict[str, Any]] = {
    "head": {},
    "layer": {"granularity": "layer"},
    "model": {"granularity": "model", "page_size": 8},
    "adaptive": {"budget_allocation": "adaptive_heads"},
    "cake": {"budget_allocation": "cake", "window": 9},
}


@pytest.fixture(scope="module")
def client() -> Iterator[CompressClient]:
    with serve() as running, CompressClient(running.address) as own:
        yield own


def in_chunks(client: CompressClient, settings: dict[str, Any], inputs: dict[str, Any], step: int) -> Any:
    tokens = inputs["keys"].shape[2]
    with client.stream(num_layers=LAYERS, num_tokens=tokens, **settings) as stream:
        for start in range(0, tokens, step):
            for layer in range(LAYERS):
                part = {role: inputs[role][layer][:, start : start + step] for role in RANGED if role in inputs}
                if start + step >= tokens:
                    part |= {role: array[layer] for role, array in inputs.items() if role not in RANGED}
                stream.put(layer, start=start, **part)
        return list(stream)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("tokens", [131, 33])
def test_every_way_gives_one_answer(scorer: str, shape: str, tokens: int, client: CompressClient) -> None:
    if (scorer, shape) == ("given", "cake"):
        with pytest.raises(graphkv.InvalidInputError):
            policy_of(scorer, **SHAPES[shape])
        return
    policy = policy_of(scorer, **SHAPES[shape])
    inputs = prompt_for(scorer, tokens, seed=tokens, policy=policy)
    arrays = {role: array.numpy() for role, array in inputs.items()}
    settings = {"policy": policy, "outputs": outputs_of(policy, tokens)}
    wanted = plain(graphkv.select(**settings, **inputs))
    assert plain(client.select(**settings, **inputs)) == wanted
    assert plain(client.select(**settings, **arrays)) == wanted
    assert plain(in_chunks(client, settings, inputs, 50)) == wanted
    assert plain(in_chunks(client, settings, arrays, 29)) == wanted
    with client.stream(num_layers=LAYERS, **settings) as stream:
        for layer in range(LAYERS):
            stream.put(layer, **{role: array[layer] for role, array in inputs.items()})
        assert plain(stream) == wanted
    if "queries" in inputs and tokens > 40:
        turned = {role: array.transpose(1, 2).contiguous() if role in HEADED else array for role, array in inputs.items()}
        assert plain(client.select(layout="NHD", **settings, **turned)) == wanted


def test_options_cross_the_wire(client: CompressClient) -> None:
    inputs = prompt_for("cake", 301)
    policy = policy_of("cake", options={"gamma": 1e6})
    assert plain(client.select(policy=policy, **inputs)) == plain(graphkv.select(policy=policy, **inputs))
