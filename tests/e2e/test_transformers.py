"""The transformers adapter on a real model and a real server, judged by text, by kept sets and by logits."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from graphkv_client import CompressClient, InvalidInputError, Policy, Selection, UnavailableError
from graphkv_testing.in_process import InProcess
from graphkv_testing.process import Server, serve
from graphkv_testing.smollm2 import Activations, activations, model, needs_model, prompt_ids

import graphkv

pytestmark = [needs_model, pytest.mark.timeout(240)]

POLICIES = {
    "snapkv": Policy.snapkv(97),
    "paper": Policy.paper(97),
    "default": Policy(97),
    "sequential": Policy.sequential(97),
    "knorm": Policy(97, scorer="knorm", sinks=3),
    "ratio": Policy.sequential(0.25),
    "layer": Policy(97, granularity="layer"),
    "layer's votes": Policy.sequential(97, granularity="layer", page_align=16),
}
TOKENS = 16


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[CompressClient]:
    with CompressClient(server.address, timeout=120) as own:
        yield own


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return model().model


@pytest.fixture(scope="module")
def real() -> Activations:
    return activations(601)


def generated(smollm2: Any, ids: torch.Tensor, **settings: Any) -> list[int]:
    whole = smollm2.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=2, **settings)
    return list(whole[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("name", POLICIES)
def test_text_through_the_service_is_the_text_of_select_in_process(name: str, client: CompressClient, smollm2: Any) -> None:
    from graphkv_client.integrations.transformers import compress

    ids = prompt_ids(311, first_topic=1)
    with compress(smollm2, client, POLICIES[name]) as served:
        text = generated(smollm2, ids)
    with compress(smollm2, InProcess(), POLICIES[name]) as local:
        assert generated(smollm2, ids) == text
    assert served.selection is not None
    assert local.selection is not None
    assert rows(served.selection) == rows(local.selection)
    assert served.summary.sent_bytes > 0


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_kept_sets_on_real_activations(name: str, kind: str, client: CompressClient, real: Activations) -> None:
    policy = POLICIES[name]
    inputs = {"keys": real.keys, "queries": real.queries} if policy.scorer == "snapkv" else {"keys": real.keys}
    expected = graphkv.select(**inputs, policy=policy, rope=real.rope)
    sent = {role: tensor.numpy() for role, tensor in inputs.items()} if kind == "numpy" else inputs
    answer = client.select(**sent, policy=policy, rope=real.rope)
    assert isinstance(answer, Selection)
    assert isinstance(expected, Selection)
    assert rows(answer) == rows(expected)
    assert answer.kept_score_ratio == expected.kept_score_ratio


def rows(selection: Selection) -> list[list[list[int]]]:
    return [np.asarray(layer.indices).tolist() for layer in selection]


def test_a_shared_answer_cuts_every_head_alike(client: CompressClient, smollm2: Any) -> None:
    from graphkv_client.integrations.transformers import compress

    ids = prompt_ids(203)
    with torch.no_grad():
        whole = next(iter(cached(smollm2, ids).values()))
        with compress(smollm2, client, Policy(61, granularity="layer")) as compression:
            short = next(iter(cached(smollm2, ids).values()))
    assert compression.selection is not None
    for answer, before, after in zip(compression.selection, whole.layers, short.layers, strict=True):
        assert answer.indices.shape == (61,)
        assert torch.equal(after.keys, before.keys[:, :, answer.indices.long()])
        assert torch.equal(after.values, before.values[:, :, answer.indices.long()])


@pytest.mark.parametrize("budget", [411, 5000, 1.0])
def test_a_prompt_within_the_budget_is_stock_generate(budget: int | float, smollm2: Any) -> None:
    from graphkv_client.integrations.transformers import compress

    ids = prompt_ids(411)
    with CompressClient("127.0.0.1:9") as nobody, compress(smollm2, nobody, Policy.sequential(budget)) as nothing:
        text = generated(smollm2, ids)
    assert text == generated(smollm2, ids)
    assert nothing.selection is None


def cached(smollm2: Any, ids: torch.Tensor) -> dict[str, Any]:
    """The cache of a prefill, under the name that the model's forward and generate know it by."""
    from graphkv_client.integrations.transformers import cache_argument

    name = cache_argument(smollm2)
    return {name: smollm2(ids)[name]}


def test_logits_after_the_cut_are_full_attention_masked_to_the_kept_tokens(client: CompressClient, smollm2: Any) -> None:
    from graphkv_client.integrations.transformers import compress

    ids, new = prompt_ids(203), prompt_ids(210)[:, 203:]
    with torch.no_grad(), compress(smollm2, client, Policy.sequential(61)) as compression:
        fed = cached(smollm2, ids)
        logits = smollm2(new, **fed).logits
        cache = next(iter(fed.values()))
    assert compression.selection is not None
    assert [layer.keys.shape[2] for layer in cache.layers] == [61 + new.shape[1]] * 30
    assert cache.get_seq_length() == 210
    with torch.no_grad():
        expected = masked(smollm2, ids, new, compression.selection)
    assert (logits - expected).abs().max() <= 1e-4


def masked(smollm2: Any, ids: torch.Tensor, new: torch.Tensor, selection: Selection) -> torch.Tensor:
    """The logits of `new` where each KV head of each layer sees the kept tokens of `ids` alone; nothing is evicted."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    n = ids.shape[1]

    def attention(module: Any, query: Any, key: Any, value: Any, _: Any, scaling: float, **__: Any) -> Any:
        seen = torch.zeros(3, query.shape[2], key.shape[2], dtype=torch.bool)
        for head, row in enumerate(selection.indices[module.layer_idx]):
            seen[head, :, row.long()] = True
        seen[:, :, n:] = torch.ones(query.shape[2], query.shape[2]).tril().bool()
        mask = seen.repeat_interleave(3, dim=0)[None]
        key, value = (part.repeat_interleave(3, dim=1) for part in (key, value))
        weights = (query @ key.mT * scaling).masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_reference", attention)
    AttentionMaskInterface.register("masked_reference", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    fed = cached(smollm2, ids)
    before = smollm2.config._attn_implementation
    smollm2.set_attn_implementation("masked_reference")
    try:
        return torch.as_tensor(smollm2(new, **fed).logits)
    finally:
        smollm2.set_attn_implementation(before)


def test_the_cut_cache_may_be_fed_by_either_form_of_generate(client: CompressClient, smollm2: Any) -> None:
    from graphkv_client.integrations.transformers import compress

    ids, question = prompt_ids(397), prompt_ids(409)[:, 397:]
    whole = torch.cat([ids, question], dim=1)
    texts = []
    for fed in (whole, question):
        with torch.no_grad(), compress(smollm2, client, Policy(80)):
            cache = cached(smollm2, ids)
        answer = smollm2.generate(
            fed,
            **cache,
            attention_mask=torch.ones_like(whole),
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=2,
        )
        texts.append(answer[0, fed.shape[1] :].tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("argument", "ids", "settings"),
    [
        ("input_ids", torch.ones(2, 99, dtype=torch.int64), {}),
        ("attention_mask", torch.ones(1, 99, dtype=torch.int64), {"attention_mask": torch.tensor([[0] + [1] * 98])}),
        ("position_ids", torch.ones(1, 99, dtype=torch.int64), {"position_ids": torch.arange(1, 100)[None]}),
    ],
    ids=["batch", "left-padding", "positions"],
)
def test_what_would_be_chosen_wrongly_is_refused(argument: str, ids: torch.Tensor, settings: Any, smollm2: Any) -> None:
    from graphkv_client.integrations.transformers import compress

    with torch.no_grad(), compress(smollm2, InProcess(), Policy(50)), pytest.raises(InvalidInputError) as refused:
        smollm2(ids, **settings)
    assert refused.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "policy"),
    [
        ("scorer", Policy(50, scorer="given")),
        ("budget_allocation", Policy.pyramidkv(50)),
        ("budget_allocation", Policy(50, budget_allocation="cake")),
        ("budget_allocation", Policy(50, budget_allocation="adaptive_heads")),
        ("granularity", Policy(50, granularity="model")),
        ("page_size", Policy(50, granularity="layer", page_size=16)),
    ],
    ids=["given", "pyramid", "cake", "adaptive heads", "model", "pages"],
)
def test_policies_that_a_cache_cannot_follow_are_refused_at_once(argument: str, policy: Policy, smollm2: Any) -> None:
    from graphkv_client.integrations.transformers import compress

    with pytest.raises(InvalidInputError) as refused, compress(smollm2, InProcess(), policy):
        pass
    assert refused.value.argument == argument


def test_a_service_that_is_gone_raises_from_the_forward_and_leaves_the_model_as_it_was(smollm2: Any) -> None:
    from graphkv_client.integrations.transformers import compress

    before = smollm2.config._attn_implementation
    with CompressClient("127.0.0.1:9", timeout=20) as nobody, torch.no_grad():
        with compress(smollm2, nobody, Policy(50)), pytest.raises(UnavailableError):
            smollm2(prompt_ids(99))
        assert smollm2.config._attn_implementation == before
        assert next(iter(cached(smollm2, prompt_ids(99)).values())).layers[0].keys.shape[2] == 99
