"""A prefill's rope is that of its prompt's length, where the model's kind of rope depends on it."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from graphkv_client import InvalidInputError, Policy, Rope

pytest.importorskip("transformers")
from graphkv_client.integrations.transformers import PrefillStream

TRAINED = 64


class Client:
    """Notes with which rope a stream was opened."""

    def __init__(self) -> None:
        self.ropes: list[Rope | None] = []

    def stream(self, *, num_layers: int, policy: Policy, rope: Rope | None) -> Any:
        self.ropes.append(rope)
        return contextlib.nullcontext()


def model(**parameters: Any) -> Any:
    config = SimpleNamespace(
        model_type="phi3",
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=TRAINED,
        original_max_position_embeddings=TRAINED,
        rope_parameters={"rope_theta": 10_000.0, **parameters},
    )
    return SimpleNamespace(config=config)


KINDS = {
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_prompt_has_the_rope_of_its_length(kind: str) -> None:
    client, own = Client(), model(**KINDS[kind])
    prefill = PrefillStream(client, Policy.sequential(9), own)
    for tokens in (TRAINED - 1, 3 * TRAINED):
        prefill.begin([0], tokens)
    short, long = (Rope.from_config(own.config, num_tokens=tokens) for tokens in (TRAINED - 1, 3 * TRAINED))
    assert client.ropes == [short, long]
    assert short != long


def test_a_rope_that_was_given_goes_first() -> None:
    client, rope = Client(), Rope((1.0,), 2)
    prefill = PrefillStream(client, Policy.sequential(9), model(rope_type="of the future"), rope=rope)
    prefill.begin([0], 99)
    assert client.ropes == [rope]


def test_a_policy_that_needs_none_has_none() -> None:
    client = Client()
    PrefillStream(client, Policy(9), model(rope_type="of the future")).begin([0], 99)
    assert client.ropes == [None]


@pytest.mark.parametrize(
    "parameters", [{"rope_type": "of the future"}, {"rope_type": "longrope", "short_factor": [1.0]}, {"rope_type": "dynamic"}]
)
def test_an_unknown_rope_is_refused_at_construction(parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="rope"):
        PrefillStream(Client(), Policy.sequential(9), model(**parameters))
