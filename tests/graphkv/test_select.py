"""select(): what a caller may hand in, what comes back, and that a row's answer is its own."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

import graphkv
from graphkv import Graph, InvalidInputError, Policy, Rope
from graphkv.algorithm import narrow, select_layers
from graphkv.budgets import plan_layers
from graphkv.candidates import Candidates
from graphkv.kernels import NAIVE
from graphkv.layer import Layer

LAYERS, HEADS, GROUP, TOKENS, DIM = 2, 3, 2, 301, 16
ROPE = Rope(tuple(10000.0 ** (-2 * i / DIM) for i in range(DIM // 2)), DIM)
POLICIES = {
    "default": Policy(40),
    "paper": Policy.paper(40),
    "sequential": Policy.sequential(40),
    "sequential-all": Policy(40, graph=Graph(update="sequential", candidates=None)),
    "additive": Policy(40, graph=Graph(update="additive", threshold=0.3)),
    "evict": Policy(40, graph=Graph(signal="evict", threshold=0.3)),
    "snapkv": Policy.snapkv(40),
    "pyramid": Policy(40, budget_allocation="pyramid", graph=Graph(threshold=0.3)),
    "knorm": Policy(40, scorer="knorm", graph=Graph(threshold=0.3)),
    "ratio": Policy(0.3, graph=Graph(threshold=0.3), sinks=3),
    "aligned": Policy(40, page_align=16),
}


def prompt(tokens: int = TOKENS, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(LAYERS, HEADS, 7, DIM, generator=generator)
    choice = torch.randint(7, (LAYERS, HEADS, tokens, 1), generator=generator).expand(-1, -1, -1, DIM)
    keys = centers.gather(2, choice) + 0.4 * torch.randn(LAYERS, HEADS, tokens, DIM, generator=generator)
    queries = torch.randn(LAYERS, HEADS * GROUP, 32, DIM, generator=generator)
    return {"keys": keys.to(dtype), "queries": queries.to(dtype)}


def select(policy: Policy, **inputs: object) -> graphkv.Selection:
    if policy.scorer == "knorm":
        inputs.pop("queries", None)
    rope = ROPE if policy.needs_rope else None
    answer = graphkv.select(policy=policy, rope=rope, **inputs)
    assert isinstance(answer, graphkv.Selection)
    return answer


def same(left: graphkv.Selection, right: graphkv.Selection) -> None:
    for own, other in zip(left.layers, right.layers, strict=True):
        assert np.array_equal(np.asarray(own.indices), np.asarray(other.indices))
        assert own.kept_score_ratio == other.kept_score_ratio
        assert own.changed == other.changed


@pytest.mark.parametrize("name", POLICIES)
def test_every_kind_of_input_gives_one_answer(name: str) -> None:
    policy, inputs = POLICIES[name], prompt()
    whole = select(policy, **inputs)
    for layer in whole.layers:
        rows = layer.indices
        assert rows.dtype == torch.int32
        assert bool((rows[:, 1:] > rows[:, :-1]).all())
        assert 0.0 <= layer.kept_score_ratio <= 1.0
    same(whole, select(policy, **{role: array.numpy() for role, array in inputs.items()}))
    same(whole, select(policy, **{role: list(array) for role, array in inputs.items()}))
    strided = {role: array.transpose(2, 3).contiguous().transpose(2, 3) for role, array in inputs.items()}
    same(whole, select(policy, **strided))
    tokens_first = {role: array.transpose(1, 2).contiguous() for role, array in inputs.items()}
    same(whole, select(policy, layout="NHD", **tokens_first))
    assert isinstance(select(policy, **{role: array.numpy() for role, array in inputs.items()}).indices[0], np.ndarray)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_naive_and_chunked_choose_alike(name: str, dtype: torch.dtype) -> None:
    policy, inputs = POLICIES[name], prompt(171, seed=3, dtype=dtype)
    plans = plan_layers(policy, num_tokens=171, num_layers=LAYERS)
    work = [
        Layer(plan, own, None if policy.scorer == "knorm" else queries, rope=ROPE)
        for plan, own, queries in zip(plans, inputs["keys"], inputs["queries"], strict=True)
    ]
    for fast, slow in zip(select_layers(work), select_layers(work, kernels=NAIVE), strict=True):
        assert torch.equal(fast.indices, slow.indices)
        assert fast.changed == slow.changed
        assert fast.kept_score_ratio == pytest.approx(slow.kept_score_ratio, rel=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_a_batch_changes_no_row(name: str) -> None:
    policy = POLICIES[name]
    prompts = [prompt(tokens, seed) for seed, tokens in enumerate((TOKENS, 33, 97, 512))]
    inputs = {"keys": [own["keys"] for own in prompts]}
    if policy.scorer != "knorm":
        inputs["queries"] = [own["queries"] for own in prompts]
    together = graphkv.select(policy=policy, rope=ROPE if policy.needs_rope else None, **inputs)
    for own, answer in zip(prompts, together, strict=True):
        same(select(policy, **own), answer)


@pytest.mark.parametrize("name", POLICIES)
def test_threads_change_no_row(name: str) -> None:
    inputs, threads = prompt(1000, seed=5), torch.get_num_threads()
    try:
        answers = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(select(POLICIES[name], **inputs))
    finally:
        torch.set_num_threads(threads)
    for answer in answers[1:]:
        same(answers[0], answer)


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.graph is None or policy.graph.candidates])
def test_the_candidates_alone_give_the_same_answer(name: str) -> None:
    policy, inputs = POLICIES[name], prompt(seed=7)
    whole = select(policy, **inputs)
    work: list[Candidates] = []
    for plan in plan_layers(policy, num_tokens=TOKENS, num_layers=LAYERS):
        queries = None if policy.scorer == "knorm" else inputs["queries"][plan.layer]
        candidates = narrow(Layer(plan, inputs["keys"][plan.layer], queries, rope=ROPE))
        assert candidates.ids.shape == (HEADS, plan.candidate_width)
        assert not candidates.indexed
        assert (candidates.keys is not None) == plan.needs_keys
        work.append(candidates)
    for layer, chosen in zip(whole.layers, select_layers(work), strict=True):
        assert torch.equal(layer.indices, chosen.indices)
        assert layer.kept_score_ratio == chosen.kept_score_ratio


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_numpy_arrays_of_small_floats(name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    inputs = {role: array.to(getattr(torch, name)) for role, array in prompt().items()}
    foreign = {role: array.float().numpy().astype(getattr(ml_dtypes, name)) for role, array in inputs.items()}
    same(select(Policy(40), **inputs), select(Policy(40), **foreign))


def test_pinned_sinks_and_window_are_kept() -> None:
    answer = select(Policy(60, sinks=2), **prompt(), pinned=[(50, 60), (55, 62)])
    for layer, head in itertools.product(answer.indices, range(HEADS)):
        assert {0, 1, *range(50, 62), *range(TOKENS - 32, TOKENS)} <= set(layer[head].tolist())


def test_padding_makes_a_ragged_answer() -> None:
    scores = torch.rand(LAYERS, HEADS, TOKENS)
    scores[0, 1, 5:] = -torch.inf
    answer = graphkv.select(prompt()["keys"], scores=scores, policy=Policy(9))
    assert [row.shape[0] for row in answer.indices[0]] == [9, 5, 9]
    assert answer.indices[0][1].tolist() == [0, 1, 2, 3, 4]
    assert answer.indices[1].shape == (HEADS, 9)
    assert [len(ranges) > 0 for ranges in answer.layers[0].dropped()] == [True] * 3


def test_the_answer_is_fenced() -> None:
    answer = select(Policy(40), **prompt())
    answer.check(num_tokens=TOKENS, policy=Policy(40))
    with pytest.raises(InvalidInputError, match="num_tokens") as caught:
        answer.check(num_tokens=TOKENS + 1)
    assert caught.value.reason == "FINGERPRINT"
    with pytest.raises(InvalidInputError, match="policy"):
        answer.check(num_tokens=TOKENS, policy=Policy(41))


def spoiled(role: str, value: float, *where: int) -> dict[str, torch.Tensor]:
    inputs = prompt()
    inputs[role][where] = value
    return inputs


@pytest.mark.parametrize(("inputs", "words"), [
    (lambda: {"policy": Policy(40), **spoiled("keys", float("nan"), 1, 2, 17, 3)}, ["keys hold nan", "layer 1, KV head 2, token 17"]),
    (lambda: {"policy": Policy(40), **spoiled("queries", float("inf"), 0, 4, 31, 0)}, ["queries hold inf", "layer 0, query head 4, row 31"]),
    (lambda: {"policy": Policy(40), "keys": prompt()["keys"], "scores": spoiled("keys", float("nan"), 0, 1, 7)["keys"][..., 0]},
     ["scores hold nan", "layer 0, KV head 1, token 7"]),
    (lambda: {"policy": Policy(40), "scores": torch.rand(LAYERS, HEADS, TOKENS), "keys": prompt()["keys"] * float("inf")}, ["keys hold"]),
])  # fmt: skip
def test_what_is_not_finite_is_named(inputs: object, words: list[str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        graphkv.select(**inputs())
    assert caught.value.reason == "NON_FINITE"
    assert all(word in str(caught.value) for word in words), caught.value


def test_keys_that_are_not_read_may_be_anything() -> None:
    scores = torch.linspace(1, 0, TOKENS).expand(LAYERS, HEADS, -1).clone()
    inputs = spoiled("keys", float("nan"), 0, 0, TOKENS - 1, 0)
    graphkv.select(inputs["keys"], scores=scores, policy=Policy(20))


@pytest.mark.parametrize(("change", "argument"), [
    ({"keys": None}, "keys"), ({"queries": None}, "queries"), ({"keys": torch.zeros(4, 5)}, "keys"),
    ({"queries": torch.zeros(LAYERS, HEADS * GROUP, 31, DIM)}, "queries"),
    ({"queries": torch.zeros(LAYERS, HEADS + 1, 32, DIM)}, "query_heads"),
    ({"queries": torch.zeros(LAYERS, HEADS, 32, DIM + 1)}, "queries"), ({"queries": torch.zeros(LAYERS + 1, HEADS, 32, DIM)}, "queries"),
    ({"scores": torch.zeros(LAYERS, HEADS, TOKENS)}, "scores"), ({"layout": "HDN"}, "layout"), ({"pinned": [(5, 5)]}, "pinned"),
    ({"pinned": [(0, 41)]}, "pinned"), ({"policy": Policy(40, scorer="given")}, "scores"), ({"policy": 40}, "policy"),
    ({"similarity_keys": torch.zeros(LAYERS, HEADS, TOKENS, 3)}, "similarity_keys"),
    ({"policy": Policy.sequential(40)}, "rope"), ({"keys": torch.zeros(LAYERS, HEADS, TOKENS, DIM, dtype=torch.int32)}, "keys"),
    ({"positions": torch.zeros(LAYERS, TOKENS)}, "positions"), ({"keys": []}, "keys"), ({"keys": "text"}, "keys"),
    ({"policy": Policy.sequential(40), "rope": Rope(tuple([1.0] * DIM), 2 * DIM)}, "rope.rotary_dim"),
])  # fmt: skip
def test_bad_input_is_named(change: dict[str, object], argument: str) -> None:
    inputs = {"policy": Policy(40), **prompt(), **change}
    with pytest.raises(InvalidInputError) as caught:
        graphkv.select(**inputs)
    assert caught.value.argument == argument, caught.value


def test_arrays_torch_cannot_read_in_place_are_copied() -> None:
    inputs = {role: array.numpy() for role, array in prompt().items()}
    wanted = select(Policy(40), **inputs)
    same(wanted, select(Policy(40), **{role: array.astype(">f4") for role, array in inputs.items()}))
    turned = {role: array[:, :, ::-1].copy()[:, :, ::-1] for role, array in inputs.items()}
    same(wanted, select(Policy(40), **turned))


@pytest.mark.parametrize(("change", "argument"), [
    ({"keys": torch.zeros(LAYERS, HEADS, TOKENS, DIM, device="meta")}, "keys"), ({"keys": np.full((2, 3, 50, 4), "x")}, "keys"),
    ({"queries": torch.zeros(LAYERS, 32, DIM), "layout": "NHD"}, "queries"), ({"pinned": 5}, "pinned"), ({"rope": "x"}, "rope"),
    ({"queries": np.full((2, 3, 50, 4), None)}, "queries"), ({"keys": torch.zeros(2, 3, 50, 4).to_sparse()}, "keys"),
])  # fmt: skip
def test_what_is_no_array_of_numbers_is_named(change: dict[str, object], argument: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        graphkv.select(**{"policy": Policy(40), **prompt(), **change})
    assert caught.value.argument == argument, caught.value


@pytest.mark.parametrize(("policy", "dim", "most"), [
    (Policy(512, scorer="knorm", graph=None), 64, 60), (Policy(512, scorer="keydiff", graph=None), 64, 60),
    (Policy.paper(512, scorer="knorm"), 16, 200), (Policy(512, graph=None), 64, 120),
    (Policy(512, scorer="knorm", granularity="layer"), 16, 80), (Policy(512, scorer="knorm", page_size=16), 16, 80),
    (Policy(512, scorer="knorm", budget_allocation="adaptive_heads"), 16, 120),
], ids=["knorm", "keydiff", "paper", "snapkv", "layer", "pages", "adaptive_heads"])  # fmt: skip
def test_memory_is_bounded_by_constants(policy: Policy, dim: int, most: int) -> None:
    """Beside the keys, in a process of its own: peak resident MiB for half a million tokens, above what was there before."""
    program = f"""
import resource, torch, graphkv
torch.set_num_threads(2)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
policy = graphkv.Policy.from_dict({policy.to_dict()!r})
def run(n):
    keys = torch.randn(1, 1, n, {dim})
    queries = torch.randn(1, 2, 32, {dim}) if policy.scorer == "snapkv" else None
    before = peak()
    graphkv.select(keys, queries=queries, policy=policy)
    return peak() - before
run(2000)
print(run(500_000))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(ran.stdout) <= most


def test_lies_about_candidates_are_refused() -> None:
    plan = plan_layers(Policy(40), num_tokens=TOKENS, num_layers=1)[0]
    inputs = prompt()
    good = narrow(Layer(plan, inputs["keys"][0], inputs["queries"][0]))
    good.check()
    lies = {
        "candidate_ids": [("ids", (0, 0), TOKENS), ("ids", (0, 0), -1), ("ids", (1, 5), 0), ("ids", (0, -1), TOKENS - 1)],
        "scores": [("scores", (0, 0), float("nan"))],
        "row_facts": [("facts", (0, 2), 1e9), ("facts", (0, 2), float("nan")), ("facts", (0, 0), float("inf"))],
    }
    for argument, changes in lies.items():
        for name, where, value in changes:
            fields = {field: getattr(good, field) for field in ("ids", "scores", "facts")}
            fields[name] = fields[name].clone()
            fields[name][where] = value
            lie = Candidates(plan, keys=good.keys, **fields)
            answer = select_layers([lie, good])
            assert isinstance(answer[0], InvalidInputError), (name, where, value)
            assert answer[0].argument == argument
            assert not isinstance(answer[1], InvalidInputError)
