"""What is promised for a layer at the header is never less than what its part and its answer then take."""

import pytest
import torch
from graphkv_server.rooms import answer_bytes, part_bytes, working_bytes
from graphkv_testing.forms import POLICIES, outputs_of
from graphkv_testing.raw import RawCall

from graphkv import Policy, select
from graphkv.algorithm import Part, allocate, select_layers
from graphkv.budgets import plan_layers
from graphkv.layer import Layer


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("all_outputs", [False, True], ids=["tokens alone", "all outputs"])
def test_an_answer_takes_no_more_than_its_room(name: str, all_outputs: bool) -> None:
    policy, call = POLICIES[name], RawCall(layers=3, window=2)
    outputs = outputs_of(policy) if all_outputs else ()
    plans = plan_layers(policy, num_tokens=call.tokens, num_layers=call.layers, outputs=outputs)
    for layer in select(call.keys, queries=call.queries, policy=policy, outputs=outputs):
        taken = sum(row.nbytes for row in layer.rows) + sum(array.nbytes for array in layer.outputs.values())
        room = answer_bytes(plans[layer.layer], call.kv_heads)
        assert 2 * taken <= room
        if policy.granularity != "model":  # there all layers bring a share of it
            assert room <= working_bytes(plans, call.kv_heads)


@pytest.mark.parametrize("name", [name for name in POLICIES if POLICIES[name].granularity == "model"])
def test_parts_and_the_answer_they_become_take_no_more_than_their_rooms(name: str) -> None:
    policy, call = POLICIES[name], RawCall(layers=3, window=2)
    plans = plan_layers(policy, num_tokens=call.tokens, num_layers=call.layers, outputs=outputs_of(policy))
    tensors = zip(torch.from_numpy(call.keys), torch.from_numpy(call.queries), strict=True)
    layers = [Layer(plan, *both) for plan, both in zip(plans, tensors, strict=True)]
    parts = [part for part in select_layers(allocate(layers)) if isinstance(part, Part)]
    assert len(parts) == 3
    kept = [part_bytes(part.plan, part.nbytes, layers=3) for part in parts]
    assert max(kept) <= working_bytes(plans, call.kv_heads)
    assert sum(kept) >= sum(part.nbytes for part in parts) + answer_bytes(plans[0], call.kv_heads)


def test_an_output_may_be_more_than_all_that_came() -> None:
    """Two candidates of a million tokens, and their updated scores of all."""
    plans = plan_layers(Policy(1, scorer="given"), num_tokens=2**20, num_layers=1, outputs=["updated_scores"])
    assert working_bytes(plans, 8) >= 2 * 8 * 4 * 2**20


def test_a_layer_whose_budget_is_not_known_may_keep_all() -> None:
    plans = plan_layers(POLICIES["cake"], num_tokens=1000, num_layers=4)
    assert answer_bytes(plans[0], 2) == 2 * 2 * 4 * 1000
