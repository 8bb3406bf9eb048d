"""The same inputs, the same kept tokens as NVIDIA kvpress: random cases, and what SmolLM2 computes for real text; float32.

A line of PEERS is a method. Where our definition differs on purpose, the line says how, and `aligned` changes exactly that in
the peer: with the change every set is equal, without it some are not. kvpress 0.5.5 has no CAKE (neither the scorer nor the
budget), no answer that heads or layers share, no pages, nor anything like the graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kvpress
import pytest
import torch
from graphkv_testing import smollm2
from graphkv_testing.peers import Drawn, Prefill, Seen, draw, prefill, removed

from graphkv import Policy, Rope, select
from graphkv.rope import average_rope
from graphkv.terms.catalogue import BUDGETS, SCORERS

# float32 scores of two implementations differ in their last digits; where two tokens lie closer than this, relative to the
# score at the cut, the peer's choice between them is not a choice
ROUNDING = 2e-5


class Summed(kvpress.ObservedAttentionPress):
    """H2O sums what a token received; the peer divides by how many queries could see it."""

    def score(self, *given: Any) -> torch.Tensor:
        means = super().score(*given)
        return means * torch.arange(means.shape[-1], 0, -1)


class SoftmaxOverAll(kvpress.ExpectedAttentionPress):
    """Ours shares the expected attention among all tokens, the peer among those after the sinks; both keep the sinks."""

    def score(self, module: Any, *given: Any) -> torch.Tensor:
        sinks, self.n_sink = self.n_sink, 0
        self.statistics_after = sinks
        scores = super().score(module, *given)
        self.n_sink = sinks
        scores[..., :sinks] = scores.max() + 1
        return scores

    def get_query_statistics(self, module: Any, hidden_states: torch.Tensor) -> Any:
        self.n_sink = self.statistics_after
        statistics = super().get_query_statistics(module, hidden_states)
        self.n_sink = 0
        return statistics


class WindowOnTop(kvpress.PyramidKVPress):
    """The authors' code adds the window to a layer's number; the peer counts it inside, and rounds where they floor."""

    def get_layer_budget(self, module: Any, q_len: int) -> int:
        return super().get_layer_budget(module, q_len) + self.window_size


@dataclass(frozen=True, slots=True)
class Peer:
    """policy: ours, of a case. press: theirs, from the ratio to remove and the case. given: what select() needs beside keys."""

    policy: Callable[[Drawn], Policy]
    press: Callable[[float, Drawn], Any]
    given: Callable[[list[Seen], Policy], dict[str, Any]] = lambda _seen, _policy: {}
    attention: str = "sdpa"
    aligned: Callable[[float, Drawn], Any] | None = None
    together: bool = False  # heads compete with each other


def window_queries(seen: list[Seen], policy: Policy) -> dict[str, Any]:
    """The last w queries."""
    return {"queries": [layer.queries[:, -policy.observation_window() :] for layer in seen]}


def all_queries(seen: list[Seen], _policy: Policy) -> dict[str, Any]:
    return {"queries": [layer.queries for layer in seen]}


def future_queries(seen: list[Seen], _policy: Policy) -> dict[str, Any]:
    """What the prompt's own queries after the first four say of the next 512, rotated by our helper."""
    rope = Rope.from_config(seen[0].module.config)
    means, covariances = [], []
    for layer in seen:
        own = layer.plain_queries[:, 4:]
        spread = own - own.mean(dim=1, keepdim=True)
        mean, covariance = average_rope(
            own.mean(dim=1), spread.transpose(1, 2) @ spread / own.shape[1], rope, start=layer.keys.shape[1], count=512
        )
        means.append(mean)
        covariances.append(covariance)
    return {"query_mean": means, "query_covariance": covariances, "values": [layer.values for layer in seen]}


def base(scorer: str, *fields: str, **others: Any) -> Callable[[Drawn], Policy]:
    """The base method under that scorer, with those fields of the case."""
    return lambda case: Policy(
        case.budget, scorer=scorer, graph=None, **{name: getattr(case, name) for name in fields}, **others
    )


def snapkv(ratio: float, case: Drawn) -> Any:
    return kvpress.SnapKVPress(ratio, window_size=case.window, kernel_size=case.pool_width)


def alpha(case: Drawn) -> float:
    return (0.2, 0.0, 0.5, 1.0)[case.seed % 4]


def sharing(case: Drawn) -> Policy:
    """AdaKV on SnapKV."""
    options = {"alpha": alpha(case)}
    return base("snapkv", "window", "pool_width", budget_allocation="adaptive_heads", options=options)(case)


PEERS: dict[str, Peer] = {
    "snapkv": Peer(base("snapkv", "window", "pool_width"), snapkv, window_queries),
    "knorm": Peer(base("knorm"), lambda ratio, _case: kvpress.KnormPress(ratio)),
    "tova": Peer(base("tova"), lambda ratio, _case: kvpress.TOVAPress(ratio), window_queries),
    "keydiff": Peer(base("keydiff"), lambda ratio, _case: kvpress.KeyDiffPress(ratio)),
    "h2o": Peer(base("h2o"), lambda ratio, _case: kvpress.ObservedAttentionPress(ratio), all_queries, "eager",
                aligned=lambda ratio, _case: Summed(ratio)),
    "expected_attention": Peer(base("expected_attention"), lambda ratio, _case: kvpress.ExpectedAttentionPress(ratio),
                               future_queries, aligned=lambda ratio, _case: SoftmaxOverAll(ratio)),
    "adaptive_heads": Peer(sharing, lambda ratio, case: kvpress.AdaKVPress(snapkv(ratio, case), alpha(case)), window_queries,
                           together=True),
}  # fmt: skip
assert set(SCORERS) - {"given", "cake"} <= set(PEERS), "a scorer without a line here"
assert set(PEERS) <= set(SCORERS) | set(BUDGETS), "a line for what there is not"


def ours(peer: Peer, case: Drawn, seen: list[Seen]) -> list[list[set[int]]]:
    policy = peer.policy(case)
    selection = select([layer.keys for layer in seen], policy=policy, **peer.given(seen, policy))
    return [[set(torch.as_tensor(row).tolist()) for row in layer.indices] for layer in selection]


def unequal_layers(peer: Peer, case: Drawn, theirs: Prefill) -> int:
    """How many layers differ; a difference must lie within rounding at the peer's own cut, or it is a difference of method."""
    unequal = 0
    for mine, kept, scores in zip(ours(peer, case, theirs.seen), theirs.kept, theirs.scores, strict=True):
        assert sum(map(len, mine)) == sum(map(len, kept))
        groups = [range(len(kept))] if peer.together else [range(head, head + 1) for head in range(len(kept))]
        for group in groups:
            dropped = [(head, token) for head in group for token in range(scores.shape[1]) if token not in kept[head]]
            cut = max((float(scores[place]) for place in dropped), default=0.0)
            for head in group:
                for token in mine[head] ^ kept[head]:
                    assert abs(float(scores[head, token]) - cut) <= ROUNDING * abs(cut), (case.id, head, token)
        unequal += mine != kept
    return unequal


def run(peer: Peer, case: Drawn, press: Callable[[float, Drawn], Any], model: Any, inputs: dict[str, torch.Tensor]) -> Prefill:
    model.set_attn_implementation(peer.attention)
    return prefill(model, press(removed(case.tokens, case.budget), case), inputs)


CASES = [draw(seed) for seed in range(60)]


@pytest.mark.parametrize("name", PEERS)
def test_the_same_tokens_on_random_inputs(name: str) -> None:
    peer = PEERS[name]
    unequal = sum(
        unequal_layers(peer, case, run(peer, case, peer.aligned or peer.press, case.model(), case.inputs())) for case in CASES
    )
    layers = sum(case.layers for case in CASES)
    assert unequal <= layers // 50, f"{unequal} of {layers} layers decided by rounding: too many to be rounding"


@pytest.mark.parametrize("name", [name for name in PEERS if PEERS[name].aligned])
def test_the_stated_difference_is_one(name: str) -> None:
    peer = PEERS[name]
    differing = [case.id for case in CASES[:20] if (theirs := run(peer, case, peer.press, case.model(), case.inputs())).kept
                 != ours(peer, case, theirs.seen)]  # fmt: skip
    assert differing, "the peer as it is agrees: nothing to state"


REAL = [
    Drawn(seed=0, tokens=601, layers=30, kv_heads=3, group=3, head_dim=64, budget=128, window=32, pool_width=7),
    Drawn(seed=1, tokens=601, layers=30, kv_heads=3, group=3, head_dim=64, budget=300, window=16, pool_width=5),
]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("case", REAL, ids=lambda case: f"B{case.budget}")
@smollm2.needs_model
def test_the_same_tokens_in_every_layer_of_smollm2(name: str, case: Drawn) -> None:
    peer = PEERS[name]
    inputs = {"input_ids": smollm2.prompt_ids(case.tokens, first_topic=case.seed)}
    theirs = run(peer, case, peer.aligned or peer.press, smollm2.model().model, inputs)
    assert len(theirs.kept) == 30
    assert unequal_layers(peer, case, theirs) <= 3


# --- AdaKV: heads that share a budget -------------------------------------------------------------------------------------


def test_adaptive_heads_differ_in_what_they_keep() -> None:
    """Or the sets above would be equal for nothing: in most layers of several heads no two keep the same number."""
    peer, several = PEERS["adaptive_heads"], [case for case in CASES if case.kv_heads > 1 and alpha(case) < 1.0]
    kept = [layer for case in several for layer in run(peer, case, peer.press, case.model(), case.inputs()).kept]
    assert sum(len({len(head) for head in layer}) > 1 for layer in kept) > len(kept) // 2


def lopsided(case: Drawn, safe: float) -> tuple[list[list[set[int]]], Prefill, Peer]:
    """AdaKV on KNorm, ours and theirs, where the first head's keys are so short that it takes whatever is not safe."""
    model = case.model()
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data[: case.head_dim] *= 0.01
    policy = Policy(case.budget, scorer="knorm", budget_allocation="adaptive_heads", graph=None, options={"alpha": safe})
    peer = Peer(lambda _case: policy, lambda ratio, _case: kvpress.AdaKVPress(kvpress.KnormPress(ratio), safe), together=True)
    theirs = run(peer, case, peer.press, model, case.inputs())
    return ours(peer, case, theirs.seen), theirs, peer


@pytest.mark.parametrize("budget", [1, 2, 3, 4])
def test_adaptive_heads_one_token_of_a_head_is_safe_at_the_peer(budget: int) -> None:
    """Where alpha x B is below one: the peer keeps the best of each head then, ours none; without alpha both share all.

    With a window, whose tokens are the best to the peer, that token is one of the window's: no difference.
    """
    case = Drawn(budget, 61, 2, 3, 1, 16, budget, 0, 1)
    mine, theirs, peer = lopsided(case, 0.0)
    assert unequal_layers(peer, case, theirs) == 0
    mine, theirs, _ = lopsided(case, 0.2)
    assert [[len(head) for head in layer] for layer in mine] == [[3 * budget, 0, 0]] * 2
    assert [[len(head) for head in layer] for layer in theirs.kept] == [[3 * budget - 2, 1, 1]] * 2


@pytest.mark.parametrize(("safe", "mine", "theirs"), [(0.29, 29, 28), (0.3, 30, 30), (0.5, 50, 50)])
def test_adaptive_heads_a_share_is_rounded_down_at_the_peer_before_rounding_errors_are(
    safe: float, mine: int, theirs: int
) -> None:
    """0.29 of 100 is 28.999999999999996: 29 tokens are safe in ours, as in every rule with a share, 28 at the peer."""
    case = Drawn(seed=5, tokens=203, layers=2, kv_heads=2, group=1, head_dim=16, budget=100, window=0, pool_width=1)
    kept, seen, _ = lopsided(case, safe)
    assert [[len(head) for head in layer] for layer in kept] == [[200 - mine, mine]] * 2
    assert [[len(head) for head in layer] for layer in seen.kept] == [[200 - theirs, theirs]] * 2


# --- PyramidKV: budgets that fall from layer to layer ---------------------------------------------------------------------


def pyramid(case: Drawn, contended: int, press: type[kvpress.PyramidKVPress]) -> Any:
    """The peer's press whose every layer shares `contended` tokens on average, as ours does beside the window."""
    return press(1.0 - contended / case.tokens, window_size=case.window, kernel_size=case.pool_width)


def falling(case: Drawn, contended: int) -> Peer:
    policy = Policy.pyramidkv(contended + case.window, window=case.window, pool_width=case.pool_width)
    return Peer(lambda _case: policy, lambda _ratio, _case: pyramid(case, contended, WindowOnTop), window_queries)


@pytest.mark.parametrize("seed", range(50))
def test_pyramid_budgets_and_tokens_where_no_rounding_comes_in(seed: int) -> None:
    """P a multiple of 20 and of the layers' steps: then the window on top is the only difference."""
    layers, contended = (3, 40) if seed % 2 else (5, 80)
    tokens = 2 * contended + 9 + 13 * (seed % 7) if seed % 3 else 2 * contended + 1
    window = 1 if layers == 3 else 1 + seed // 2 % 3  # from P / 20 on, the peer gives every layer the same
    case = Drawn(seed, tokens, layers, 1 + seed % 2, 1 + seed % 3, 16, contended + window, window, 3 + 2 * (seed % 3))
    peer = falling(case, contended)
    theirs = run(peer, case, peer.press, case.model(), case.inputs())
    assert unequal_layers(peer, case, theirs) <= 1
    as_it_is = run(
        peer, case, lambda _ratio, _case: pyramid(case, contended, kvpress.PyramidKVPress), case.model(), case.inputs()
    )
    for mine, kept in zip(theirs.kept, as_it_is.kept, strict=True):
        assert [len(row) for row in mine] == [len(row) + case.window for row in kept]
        assert all(few <= many for few, many in zip(kept, mine, strict=True))


@smollm2.needs_model
def test_pyramid_on_every_layer_of_smollm2() -> None:
    case = Drawn(seed=0, tokens=1201, layers=30, kv_heads=3, group=3, head_dim=64, budget=588, window=8, pool_width=7)
    peer = falling(case, 580)
    theirs = run(peer, case, peer.press, smollm2.model().model, {"input_ids": smollm2.prompt_ids(case.tokens)})
    assert len(theirs.kept[0][0]) > len(theirs.kept[-1][0])
    assert unequal_layers(peer, case, theirs) <= 1
