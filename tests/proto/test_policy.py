"""Policies, graphs and ropes cross the wire without loss, and what a peer must not send is refused with its path."""

import pytest
from graphkv_proto import messages
from graphkv_proto import v1 as pb
from graphkv_testing.wire import MOST, policies, ropes
from hypothesis import given

from graphkv.terms.errors import InvalidInputError, Reason
from graphkv.terms.policy import Graph, Policy
from graphkv.terms.rope import Rope

PRESETS = {
    "default": Policy(512),
    "share of the prompt": Policy(0.25),
    "all of it": Policy(1.0),
    "one token": Policy(1),
    "paper": Policy.paper(64, rounds=3),
    "sequential": Policy.sequential(0.1),
    "snapkv": Policy.snapkv(7, window=9, pool_width=5, sinks=0),
    "pyramidkv": Policy.pyramidkv(128, page_align=16),
    "neighbors counted": Policy(3, graph=Graph(neighbors=2, threshold=0.0)),
    "neighbors by threshold": Policy(3, graph=Graph(neighbors=None, threshold=1e-9)),
    "all candidates": Policy(3, graph=Graph(candidates=None)),
    "evict": Policy(3, scorer="knorm", window=0, graph=Graph(signal="evict", strength=0.0, source_ratio=0.0)),
    "cake": Policy(128, scorer="cake", budget_allocation="cake", options={"gamma": 0.0, "tau2": 0.5}),
    "adaptive heads": Policy(128, budget_allocation="adaptive_heads", options={"alpha": 0.0}),
    "pages of a layer, max": Policy(128, granularity="layer", page_size=16, combine="max"),
    "one for the model": Policy.sequential(64, granularity="model"),
    "additive, max": Policy(3, scorer="given", pooling="max", graph=Graph(update="additive", signal="enhance")),
}


def sent(policy: Policy) -> pb.Policy:
    return pb.Policy.FromString(messages.write_policy(policy).SerializeToString())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_cross_unchanged(name: str) -> None:
    got = messages.read_policy(sent(PRESETS[name]))
    assert got == PRESETS[name]
    assert type(got.budget) is type(PRESETS[name].budget)
    assert got.fingerprint == PRESETS[name].fingerprint


@given(policies())
def test_any_policy_crosses_unchanged(policy: Policy) -> None:
    got = messages.read_policy(sent(policy))
    assert got == policy
    assert got.fingerprint == policy.fingerprint


@given(ropes())
def test_any_rope_crosses_unchanged(rope: Rope) -> None:
    assert messages.read_rope(pb.Rope.FromString(messages.write_rope(rope).SerializeToString())) == rope


@pytest.mark.parametrize(
    ("policy", "argument"),
    [
        (Policy(2**63), "policy.budget"),
        (Policy(1, window=10**30), "policy.window"),
        (Policy(1, sinks=2**63), "policy.sinks"),
        (Policy(1, page_align=2**64), "policy.page_align"),
        (Policy(1, page_size=2**64), "policy.page_size"),
        (Policy(1, graph=Graph(neighbors=2**63)), "policy.graph.neighbors"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_numbers_beyond_int64_cannot_be_written(policy: Policy, argument: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        messages.write_policy(policy)
    assert (caught.value.argument, caught.value.reason) == (argument, Reason.TOO_LARGE)


BAD = {
    "no budget": (lambda p: p.ClearField("budget"), "policy.budget", Reason.BAD_POLICY),
    "budget 0": (lambda p: p.MergeFrom(pb.Policy(budget_tokens=0)), "policy.budget", Reason.BAD_POLICY),
    "budget -1": (lambda p: p.MergeFrom(pb.Policy(budget_tokens=-1)), "policy.budget", Reason.BAD_POLICY),
    "ratio 0": (lambda p: p.MergeFrom(pb.Policy(budget_ratio=0.0)), "policy.budget", Reason.BAD_POLICY),
    "ratio above 1": (lambda p: p.MergeFrom(pb.Policy(budget_ratio=1.5)), "policy.budget", Reason.BAD_POLICY),
    "ratio NaN": (lambda p: p.MergeFrom(pb.Policy(budget_ratio=float("nan"))), "policy.budget", Reason.BAD_POLICY),
    "window -1": (lambda p: setattr(p, "window", -1), "policy.window", Reason.BAD_POLICY),
    "even pool_width": (lambda p: setattr(p, "pool_width", 4), "policy.pool_width", Reason.BAD_POLICY),
    "sinks least int64": (lambda p: setattr(p, "sinks", -MOST - 1), "policy.sinks", Reason.BAD_POLICY),
    "page_align 0": (lambda p: setattr(p, "page_align", 0), "policy.page_align", Reason.BAD_POLICY),
    "page_size 0": (lambda p: setattr(p, "page_size", 0), "policy.page_size", Reason.BAD_POLICY),
    "page_size -1": (lambda p: setattr(p, "page_size", -1), "policy.page_size", Reason.BAD_POLICY),
    "an option of another budget": (lambda p: p.options.update(alpha=0.2), "policy.options", Reason.UNKNOWN_NAME),
    "an option of nothing": (lambda p: p.options.update({"o" * 900: 0.2}), "policy.options", Reason.UNKNOWN_NAME),
    "alpha above 1": (
        lambda p: p.MergeFrom(pb.Policy(budget_allocation=pb.BUDGET_ALLOCATION_ADAPTIVE_HEADS, options={"alpha": 1.5})),
        "policy.options.alpha", Reason.BAD_POLICY,
    ),
    "a model's shares by layer": (
        lambda p: p.MergeFrom(pb.Policy(granularity=pb.GRANULARITY_MODEL, budget_allocation=pb.BUDGET_ALLOCATION_PYRAMID)),
        "policy.budget_allocation", Reason.BAD_POLICY,
    ),
    "adaptive heads of a layer": (
        lambda p: p.MergeFrom(
            pb.Policy(granularity=pb.GRANULARITY_LAYER, budget_allocation=pb.BUDGET_ALLOCATION_ADAPTIVE_HEADS)
        ),
        "policy.granularity", Reason.BAD_POLICY,
    ),
    "adaptive heads in pages": (
        lambda p: p.MergeFrom(pb.Policy(page_size=4, budget_allocation=pb.BUDGET_ALLOCATION_ADAPTIVE_HEADS)),
        "policy.page_size", Reason.BAD_POLICY,
    ),
    "cake without attention": (
        lambda p: p.MergeFrom(pb.Policy(scorer=pb.SCORER_GIVEN, budget_allocation=pb.BUDGET_ALLOCATION_CAKE)),
        "policy.scorer", Reason.BAD_POLICY,
    ),
    "rounds 65": (lambda p: setattr(p.graph, "rounds", 65), "policy.graph.rounds", Reason.BAD_POLICY),
    "strength NaN": (lambda p: setattr(p.graph, "strength", float("nan")), "policy.graph.strength", Reason.BAD_POLICY),
    "candidates inf": (lambda p: setattr(p.graph, "candidates", float("inf")), "policy.graph.candidates", Reason.BAD_POLICY),
    "neighbors 0": (lambda p: setattr(p.graph, "neighbors_count", 0), "policy.graph.neighbors", Reason.BAD_POLICY),
    "no limit at all": (lambda p: setattr(p.graph, "threshold", 0.0), "policy.graph.threshold", Reason.BAD_POLICY),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_policy_is_refused_with_its_path(name: str) -> None:
    bend, argument, reason = BAD[name]
    message = sent(Policy(5))
    bend(message)
    with pytest.raises(InvalidInputError) as caught:
        messages.read_policy(message)
    assert (caught.value.argument, caught.value.reason) == (argument, reason)
    assert str(caught.value).startswith(argument)


@pytest.mark.parametrize("field", ["source_ratio", "threshold", "rounds", "strength"])
def test_a_forgotten_number_is_not_zero(field: str) -> None:
    message = sent(Policy(5))
    message.graph.ClearField(field)
    with pytest.raises(InvalidInputError, match=f"policy.graph.{field} is None") as caught:
        messages.read_policy(message)
    assert caught.value.reason == Reason.BAD_POLICY


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("scorer", "cake, expected_attention, given, h2o, keydiff, knorm, snapkv, tova"),
        ("budget_allocation", "adaptive_heads, cake, pyramid, uniform"),
        ("pooling", "avg, max"),
        ("granularity", "head, layer, model"),
        ("combine", "max, mean"),
        ("graph.similarity", "post_rope, pre_rope"),
        ("graph.signal", "decay, enhance, evict"),
        ("graph.update", "additive, product, sequential"),
    ],
)
@pytest.mark.parametrize(("number", "reason"), [(0, Reason.BAD_POLICY), (999, Reason.UNKNOWN_NAME), (-1, Reason.UNKNOWN_NAME)])
def test_an_enum_that_is_nothing_names_what_is_known(field: str, known: str, number: int, reason: Reason) -> None:
    message = sent(Policy(5))
    holder, _, name = field.rpartition(".")
    setattr(message.graph if holder else message, name, number)
    with pytest.raises(InvalidInputError) as caught:
        messages.read_policy(pb.Policy.FromString(message.SerializeToString()))
    assert (caught.value.argument, caught.value.reason) == (f"policy.{field}", reason)
    assert known in str(caught.value)


@pytest.mark.parametrize(
    ("rope", "argument"),
    [
        (pb.Rope(), "rope.rotary_dim"),
        (pb.Rope(rotary_dim=-2), "rope.rotary_dim"),
        (pb.Rope(rotary_dim=2**62), "rope.rotary_dim"),
        (pb.Rope(rotary_dim=4, inv_freq=[1.0]), "rope.inv_freq"),
        (pb.Rope(rotary_dim=3, inv_freq=[1.0]), "rope.inv_freq"),
        (pb.Rope(rotary_dim=2, inv_freq=[float("inf")]), "rope.inv_freq"),
        (pb.Rope(rotary_dim=2, inv_freq=[1.0] * 500_000), "rope.inv_freq"),
    ],
    ids=["empty", "negative", "2^62", "too few", "odd", "infinite", "half a million"],
)
def test_a_bad_rope_is_refused(rope: pb.Rope, argument: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        messages.read_rope(rope)
    assert caught.value.argument == argument
    assert len(str(caught.value)) < 300
