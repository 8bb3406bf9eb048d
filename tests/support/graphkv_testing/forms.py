"""Calls in every form that a layer may arrive in, for any policy, and their answers held against the library's own."""

from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import torch
from graphkv_proto import messages
from graphkv_proto import v1 as pb

from graphkv import Graph, Policy, Selection, select
from graphkv.algorithm import narrow, score_layer
from graphkv.budgets import plan_layers
from graphkv.layer import Layer
from graphkv.terms.catalogue import OUTPUTS
from graphkv.terms.errors import InvalidInputError
from graphkv.terms.needs import check_outputs
from graphkv_testing.raw import Outcome, RawCall

__all__ = ["FORMS", "POLICIES", "assert_library", "call_of", "forms_of", "library", "outputs_of"]

FORMS = ("whole", "scores", "narrowed")
"""Keys and queries; the scores of all tokens and the keys that are read; candidates, with the scores of all where needed."""

_GRAPH = Graph(threshold=0.2, candidates=1.5)
_SEQUENTIAL = Graph(update="sequential", strength=0.5, candidates=1.5)
POLICIES = {
    "heads": Policy(7, window=2, graph=_GRAPH),
    "heads, sequential": Policy(7, window=2, graph=_SEQUENTIAL),
    "heads, all of them": Policy(23, window=2, graph=_GRAPH),
    "a layer": Policy(7, window=2, graph=_GRAPH, granularity="layer"),
    "a layer, the largest": Policy(7, window=2, graph=_GRAPH, granularity="layer", combine="max"),
    "a layer, base": Policy(7, window=2, graph=None, granularity="layer"),
    "a layer, votes": Policy(7, window=2, graph=_SEQUENTIAL, granularity="layer"),
    "a layer, pyramid": Policy(9, window=2, graph=_GRAPH, granularity="layer", budget_allocation="pyramid"),
    "a layer, among all": Policy.paper(7, window=2, granularity="layer"),
    "pages": Policy(9, window=2, graph=_GRAPH, page_size=4),
    "pages, votes": Policy(9, window=2, graph=_SEQUENTIAL, page_size=4),
    "pages larger than a prompt": Policy(9, window=2, graph=_GRAPH, page_size=24),
    "pages of a layer": Policy(9, window=2, graph=_GRAPH, granularity="layer", page_size=4),
    "a model": Policy(7, window=2, graph=_GRAPH, granularity="model"),
    "a model, all of it": Policy(23, window=2, graph=_GRAPH, granularity="model"),
    "a model, base": Policy(7, window=2, graph=None, granularity="model"),
    "a model, votes": Policy(7, window=2, graph=_SEQUENTIAL, granularity="model"),
    "pages of a model": Policy(9, window=2, graph=_GRAPH, granularity="model", page_size=4),
    "adaptive heads": Policy(7, window=2, graph=_GRAPH, budget_allocation="adaptive_heads"),
    "adaptive heads, base": Policy(7, window=2, graph=None, budget_allocation="adaptive_heads"),
    "adaptive heads, sequential": Policy(7, window=2, graph=_SEQUENTIAL, budget_allocation="adaptive_heads"),
    "cake": Policy(7, window=2, graph=_GRAPH, scorer="cake", budget_allocation="cake"),
    "cake, of a layer": Policy(7, window=2, graph=_GRAPH, budget_allocation="cake", granularity="layer"),
    "cake, another scorer": Policy(7, window=2, graph=_GRAPH, scorer="knorm", budget_allocation="cake"),
    "cake, in pages": Policy(9, window=2, graph=_SEQUENTIAL, budget_allocation="cake", page_size=4),
    "cake, all of it": Policy(23, window=2, graph=_GRAPH, scorer="cake", budget_allocation="cake"),
}
"""One of every budget, granularity and unit, with and without a graph, for prompts of 23 tokens and a window of 2."""


def forms_of(policy: Policy) -> list[str]:
    """The forms that layers under this policy may have."""
    if policy.budget_allocation == "cake":
        return ["whole"]
    return [*FORMS[:2], *(FORMS[2:] if _plans(policy, RawCall())[0].candidates is not None else ())]


def outputs_of(policy: Policy) -> tuple[str, ...]:
    """All outputs that this policy can give."""
    return tuple(name for name in OUTPUTS if _gives(policy, name))


def call_of(policy: Policy, form: str = "whole", *, outputs: Sequence[str] = (), **sizes: Any) -> RawCall:
    """The call of a caller whose importance is the policy's own scorer's; sizes: RawCall's."""
    call = RawCall(**sizes)
    header = call.header
    header.policy.CopyFrom(messages.write_policy(policy))
    header.outputs.extend(getattr(pb, f"OUTPUT_{name.upper()}") for name in outputs)
    if form != "whole":
        header.query_heads = 0
        call.tensors = [each for layer in _layers(policy, call, outputs) for each in _tensors(layer, form)]
    sizes_of = [sum(array.nbytes for own, _, array, _ in call.tensors if own == layer) for layer in range(call.layers)]
    header.largest_layer_bytes, header.total_bytes = max(sizes_of), sum(sizes_of)
    return call


def library(policy: Policy, call: RawCall, outputs: Sequence[str] = ()) -> Selection:
    """What the library answers in-process to the keys and queries of the call."""
    answer = select(call.keys, queries=call.queries, policy=policy, outputs=outputs)
    assert isinstance(answer, Selection)
    return answer


def assert_library(got: Outcome, expected: Selection, policy: Policy) -> None:
    """The answer is the library's, number for number."""
    assert got.code == grpc.StatusCode.OK, got.message
    assert got.summary is not None
    assert sorted(got.answers) == [(0, layer.layer) for layer in expected.layers]
    for layer in expected.layers:
        answer = messages.read_layer(got.answers[0, layer.layer], policy=policy)
        for row, own in zip(answer.rows, layer.rows, strict=True):
            np.testing.assert_array_equal(row, own)
        assert isinstance(answer.indices, list) == isinstance(layer.indices, list)
        assert (answer.changed, answer.fingerprint) == (layer.changed, layer.fingerprint)
        assert abs(answer.kept_score_ratio - layer.kept_score_ratio) < 1e-9
        assert list(answer.outputs) == list(layer.outputs)
        for name, array in layer.outputs.items():
            np.testing.assert_array_equal(answer.outputs[name], array, strict=True, err_msg=name)


def _plans(policy: Policy, call: RawCall, outputs: Sequence[str] = ()) -> Any:
    return plan_layers(policy, num_tokens=call.tokens, num_layers=call.layers, outputs=outputs)


def _layers(policy: Policy, call: RawCall, outputs: Sequence[str]) -> list[Layer]:
    return [
        Layer(plan, torch.from_numpy(call.keys[plan.layer]), torch.from_numpy(call.queries[plan.layer]))
        for plan in _plans(policy, call, outputs)
    ]


def _tensors(layer: Layer, form: str) -> list[tuple[int, int, Any, int]]:
    """What a caller who computes scores sends of a layer: (layer, role, array, count)."""
    plan = layer.plan
    if form == "scores" or plan.candidates is None:  # the last layers of a pyramid may have none where the first have some
        sent = [(pb.ROLE_SCORES, score_layer(layer), plan.num_tokens)]
        if plan.needs_keys:
            sent.append((pb.ROLE_KEYS, layer.keys, plan.num_tokens))
    else:
        taken = narrow(layer)
        sent = [(pb.ROLE_CANDIDATE_IDS, taken.ids, 0)]
        if taken.all_scores is None:
            sent += [(pb.ROLE_SCORES, taken.scores, 0), (pb.ROLE_ROW_FACTS, taken.facts, 0)]
        else:
            sent.append((pb.ROLE_SCORES, taken.all_scores, plan.num_tokens))
        if taken.keys is not None:
            sent.append((pb.ROLE_KEYS, taken.keys, 0))
    return [(plan.layer, role, tensor.numpy(), count) for role, tensor, count in sent if tensor.numel()]


def _gives(policy: Policy, output: str) -> bool:
    try:
        return check_outputs(policy, [output]) == (output,)
    except InvalidInputError:
        return False
