"""Every scorer against its formula, written down once more in float64 loops, and what it may be given."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphkv_testing.every_scorer import DIM, GROUP, HEADS, layer_inputs, policy_of, prompt_for

import graphkv
from graphkv import InvalidInputError, Policy, Rope
from graphkv.algorithm import score_layer
from graphkv.budgets import plan_layers
from graphkv.layer import Layer
from graphkv.rope import average_rope
from graphkv.terms.catalogue import SCORERS

Inputs = dict[str, torch.Tensor]


def attention_of(own: Inputs) -> torch.Tensor:
    """float64 [Hq, w, n], one query at a time."""
    queries, keys = own["queries"].double(), own["keys"].double()
    heads, rows, _ = queries.shape
    tokens = keys.shape[1]
    attention = torch.zeros(heads, rows, tokens, dtype=torch.float64)
    for head in range(heads):
        for row in range(rows):
            seen = tokens - rows + row + 1
            logits = keys[head // GROUP][:seen] @ queries[head, row] / math.sqrt(DIM)
            attention[head, row, :seen] = torch.softmax(logits, 0)
    return attention


def by_group(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([values[head * GROUP : (head + 1) * GROUP].mean(0) for head in range(HEADS)])


def pooled(values: torch.Tensor, width: int) -> torch.Tensor:
    padded = F.pad(values, (width // 2, width // 2))
    return torch.stack([padded[:, place : place + width].sum(1) / width for place in range(values.shape[1])], 1)


def snapkv(own: Inputs, attention: torch.Tensor, policy: Policy) -> torch.Tensor:
    rows = attention.shape[1]
    return by_group(pooled(attention.mean(1)[:, : attention.shape[2] - rows], 7))


def cake(own: Inputs, attention: torch.Tensor, policy: Policy) -> torch.Tensor:
    before = attention[:, :, : attention.shape[2] - attention.shape[1]]
    variance = before.var(1, correction=1) if before.shape[1] > 1 else torch.zeros_like(before[:, 0])
    return by_group(pooled(before.mean(1) + policy.option("gamma") * variance, 5))


def h2o(own: Inputs, attention: torch.Tensor, policy: Policy) -> torch.Tensor:
    return by_group(attention.sum(1))


def tova(own: Inputs, attention: torch.Tensor, policy: Policy) -> torch.Tensor:
    return attention[:, -1].mean(0).expand(HEADS, -1)


def knorm(own: Inputs, attention: torch.Tensor, policy: Policy) -> torch.Tensor:
    return -own["keys"].double().square().sum(-1).sqrt()


def keydiff(own: Inputs, attention: torch.Tensor, policy: Policy) -> torch.Tensor:
    unit = F.normalize(own["keys"].double(), dim=-1)
    return -F.cosine_similarity(unit, unit.mean(1, keepdim=True), dim=-1)


def expected_attention(own: Inputs, attention: torch.Tensor, policy: Policy) -> torch.Tensor:
    rows = []
    for head in range(HEADS * GROUP):
        keys, mean, covariance = (
            own["keys"][head // GROUP].double(),
            own["query_mean"][head].double(),
            own["query_covariance"][head].double(),
        )
        logits = [float(key @ mean) / math.sqrt(DIM) + float(key @ covariance @ key) / (2 * DIM) for key in keys]
        rows.append(torch.softmax(torch.tensor(logits, dtype=torch.float64), 0))
    return by_group(torch.stack(rows)) * own["value_norms"].double()


def given(own: Inputs, attention: torch.Tensor, policy: Policy) -> torch.Tensor:
    return own["scores"].double()


FORMULAS: dict[str, Callable[[Inputs, torch.Tensor, Policy], torch.Tensor]] = {
    "snapkv": snapkv,
    "cake": cake,
    "h2o": h2o,
    "tova": tova,
    "knorm": knorm,
    "keydiff": keydiff,
    "expected_attention": expected_attention,
    "given": given,
}


def test_every_scorer_has_its_formula_here() -> None:
    assert set(FORMULAS) == set(SCORERS)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("tokens", [41, 131, 777])
@pytest.mark.parametrize("source", ["queries", "attention", "attention_f16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_the_formula(scorer: str, tokens: int, source: str, dtype: torch.dtype) -> None:
    if source != "queries" and not SCORERS[scorer].reads_attention:
        pytest.skip("reads no attention")
    policy = policy_of(scorer)
    plan = plan_layers(policy, num_tokens=tokens, num_layers=1, caller_scores=scorer == "given")[0]
    own = layer_inputs(prompt_for(scorer, tokens, seed=tokens, dtype=dtype), 0)
    attention = attention_of(own) if "queries" in own else torch.empty(0)
    if source != "queries":
        own["attention"] = attention.to(torch.float16 if source == "attention_f16" else torch.float32)
        attention = own["attention"].double()
        del own["queries"]
    wanted = FORMULAS[scorer](own, attention, policy)
    scores = score_layer(Layer(plan, **own))
    competes = torch.ones(tokens, dtype=torch.bool)
    for start, stop in plan.always:
        competes[start:stop] = False
    wanted = F.pad(wanted, (0, tokens - wanted.shape[1]))[:, competes]
    torch.testing.assert_close(scores[:, competes].double(), wanted, rtol=3e-5, atol=1e-9)
    assert not scores[:, ~competes].any()


@pytest.mark.parametrize("scorer", SCORERS)
def test_threads_and_batches_change_no_score(scorer: str) -> None:
    inputs, policy, threads = prompt_for(scorer, 777), policy_of(scorer), torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(graphkv.select(policy=policy, **inputs))
    finally:
        torch.set_num_threads(threads)
    batch = graphkv.select(policy=policy, **{role: [array, array] for role, array in inputs.items()})
    for answer in (*answers[1:], *batch):
        for own, first in zip(answer.layers, answers[0].layers, strict=True):
            assert torch.equal(own.indices, first.indices)
            assert own.kept_score_ratio == first.kept_score_ratio


@pytest.mark.parametrize("scorer", [name for name, terms in SCORERS.items() if terms.reads_attention or terms.needs])
def test_what_a_scorer_needs_is_named(scorer: str) -> None:
    inputs = prompt_for(scorer)
    for role in sorted(set(inputs) - {"keys"}):
        with pytest.raises(InvalidInputError) as caught:
            graphkv.select(policy=policy_of(scorer), **{name: array for name, array in inputs.items() if name != role})
        assert caught.value.argument == role
        assert scorer in str(caught.value)


@pytest.mark.parametrize("scorer", [name for name, terms in SCORERS.items() if not terms.needs and name != "given"])
def test_what_a_scorer_does_not_read_is_refused(scorer: str) -> None:
    extra = prompt_for("expected_attention")["values"]
    with pytest.raises(InvalidInputError, match=r"values is 'given'"):
        graphkv.select(policy=policy_of(scorer), values=extra, **prompt_for(scorer))


def test_scores_stand_in_for_any_scorer() -> None:
    for scorer in SCORERS:
        answer = graphkv.select(prompt_for("given")["keys"], scores=prompt_for("given")["scores"], policy=policy_of(scorer))
        assert answer.layers[0].importance == "scores"


def test_the_wrong_number_of_queries_is_refused() -> None:
    inputs = prompt_for("h2o")
    with pytest.raises(InvalidInputError, match="one a token"):
        graphkv.select(inputs["keys"], queries=inputs["queries"][:, :, 1:], policy=policy_of("h2o"))
    graphkv.select(inputs["keys"], queries=inputs["queries"], policy=policy_of("tova"))


@pytest.mark.parametrize("role", ["query_mean", "query_covariance", "values", "keys"])
def test_expected_attention_wants_finite_numbers(role: str) -> None:
    inputs = prompt_for("expected_attention")
    inputs[role][1, 1, 2] = float("nan")
    with pytest.raises(InvalidInputError, match="nan at layer 1") as caught:
        graphkv.select(policy=policy_of("expected_attention"), **inputs)
    assert caught.value.reason == "NON_FINITE"


@pytest.mark.parametrize("interleaved", [False, True])
def test_average_rope_is_the_mean_of_rotations(interleaved: bool) -> None:
    rope = Rope((1.0, 0.1, 0.01), 6, interleaved)
    mean, spread = torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 8, 8, dtype=torch.float64)
    total = torch.zeros(8, 8, dtype=torch.float64)
    for position in range(7, 7 + 13):
        rotation = torch.eye(8, dtype=torch.float64)
        for pair, frequency in enumerate(rope.inv_freq):
            first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 3)
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            rotation[first, first], rotation[first, second] = cos, -sin
            rotation[second, first], rotation[second, second] = sin, cos
        total += rotation / 13
    rotated, widened = average_rope(mean, spread, rope, start=7, count=13)
    torch.testing.assert_close(rotated, mean @ total.T)
    torch.testing.assert_close(widened, total @ spread @ total.T)


def test_gamma_is_cakes_own_option() -> None:
    assert policy_of("cake", options={"gamma": 3}).option("gamma") == 3.0
    assert policy_of("cake", options={"gamma": 200}).fingerprint == policy_of("cake").fingerprint
    assert policy_of("cake", options={"gamma": 3}).fingerprint != policy_of("cake").fingerprint
    for scorer, options in (("snapkv", {"gamma": 3}), ("cake", {"delta": 3}), ("cake", {"gamma": -1}), ("cake", 3)):
        with pytest.raises(InvalidInputError, match="options"):
            policy_of(scorer, options=options)
