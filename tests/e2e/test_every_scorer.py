"""Every scorer of the catalogue through a real server, in every way a call can be made: one answer."""

from collections.abc import Iterator
from typing import Any

import pytest
from graphkv_client import CompressClient
from graphkv_testing.every_scorer import LAYERS, policy_of, prompt_for
from graphkv_testing.process import serve

import graphkv
from graphkv.terms.catalogue import SCORERS

RANGED = ("keys", "scores", "values")


@pytest.fixture(scope="module")
def client() -> Iterator[CompressClient]:
    with serve() as running, CompressClient(running.address) as own:
        yield own


def plain(layers: Any) -> list[tuple[object, ...]]:
    ordered = sorted(layers, key=lambda own: own.layer)
    return [(own.indices.tolist(), own.kept_score_ratio, own.changed, own.importance) for own in ordered]


def in_chunks(client: CompressClient, policy: graphkv.Policy, inputs: dict[str, Any], step: int) -> Any:
    tokens = inputs["keys"].shape[2]
    with client.stream(num_layers=LAYERS, num_tokens=tokens, policy=policy) as stream:
        for start in range(0, tokens, step):
            for layer in range(LAYERS):
                part = {role: inputs[role][layer][:, start : start + step] for role in RANGED if role in inputs}
                if start + step >= tokens:
                    part |= {role: array[layer] for role, array in inputs.items() if role not in RANGED}
                stream.put(layer, start=start, **part)
        return list(stream)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("tokens", [131, 33])
def test_every_way_gives_one_answer(scorer: str, tokens: int, client: CompressClient) -> None:
    policy, inputs = policy_of(scorer), prompt_for(scorer, tokens, seed=tokens)
    arrays = {role: array.numpy() for role, array in inputs.items()}
    wanted = plain(graphkv.select(policy=policy, **inputs))
    assert plain(client.select(policy=policy, **inputs)) == wanted
    assert plain(client.select(policy=policy, **arrays)) == wanted
    assert plain(in_chunks(client, policy, inputs, 50)) == wanted
    assert plain(in_chunks(client, policy, arrays, 29)) == wanted
    with client.stream(num_layers=LAYERS, policy=policy) as stream:
        for layer in range(LAYERS):
            stream.put(layer, **{role: array[layer] for role, array in inputs.items()})
        assert plain(stream) == wanted
    if "queries" in inputs and tokens > 40:
        turned = {role: array.transpose(1, 2).contiguous() for role, array in inputs.items()}
        assert plain(client.select(policy=policy, layout="NHD", **turned)) == wanted


def test_options_cross_the_wire(client: CompressClient) -> None:
    inputs = prompt_for("cake", 301)
    policy = policy_of("cake", options={"gamma": 1e6})
    assert plain(client.select(policy=policy, **inputs)) == plain(graphkv.select(policy=policy, **inputs))
