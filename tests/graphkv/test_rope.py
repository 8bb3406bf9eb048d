"""`Rope.from_config` against transformers' own rotary modules and against the keys that tiny models of many families cache."""

import ast
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging import version

from graphkv.rope import unrotate
from graphkv.terms.errors import InvalidInputError
from graphkv.terms.rope import Rope
from graphkv.terms.rope_kinds import INTERLEAVED, KINDS

transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")

READ = "5.24.0"  # the release of transformers whose families were read for how they rotate
TOKENS = 23
LONG = [1.0 + i / 4 for i in range(8)]
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 10000.0},
    "linear": {"rope_theta": 5000.0, "factor": 4.0},
    "dynamic": {"rope_theta": 10000.0, "factor": 3.0},
    "llama3": {"rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
    "yarn": {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256},
    "longrope": {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "long_factor": LONG,
                 "short_factor": [1.0] * 8},
    "proportional": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
# family: config class, its own fields; the last layer is one of full attention
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, **WINDOWS, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}}}),
    "gemma4": ("Gemma4TextConfig", {"head_dim": 16, "global_head_dim": 32, **WINDOWS, "hidden_size_per_layer_input": 0}),
    "phi3-short": ("Phi3Config", {"rope_parameters": {"rope_type": "longrope", **SETTINGS["longrope"]},
                                  "original_max_position_embeddings": 64}),
    "phi3-long": ("Phi3Config", {"rope_parameters": {"rope_type": "longrope", **SETTINGS["longrope"]},
                                 "original_max_position_embeddings": 16}),
    "gpt-oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, **WINDOWS, "rope_parameters": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "rope_theta": 150000.0,
        "original_max_position_embeddings": 64}}),
    "gpt-neox": ("GPTNeoXConfig", {"rotary_pct": 0.25}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "glm": ("GlmConfig", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", WINDOWS),
    "flint": ("FlintConfig", {"head_dim": 16, **WINDOWS}),
    "granite-swa": ("GraniteSWAConfig", {**WINDOWS, "layer_rope_theta": [10000.0, 500.0]}),
    "helium": ("HeliumConfig", {"head_dim": 16}),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 16}),
    "exaone4": ("Exaone4Config", {"head_dim": 16, **WINDOWS}),
    "nanochat": ("NanoChatConfig", {}),
    "llama-dynamic": ("LlamaConfig", {"max_position_embeddings": 16, "rope_parameters": {
        "rope_type": "dynamic", **SETTINGS["dynamic"]}}),
}  # fmt: skip
STANDING = {"cohere2", "exaone4", "flint"}  # families whose full-attention layers do not rotate


def llama(kind: str, **changes: Any) -> Any:
    return transformers.LlamaConfig(**{**TINY, "rope_parameters": {"rope_type": kind, **SETTINGS[kind]}, **changes})


@pytest.mark.parametrize("tokens", [5, 16, 17, 1000], ids="n{}".format)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_frequencies_of_transformers(kind: str, tokens: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = llama(kind)
    module = LlamaRotaryEmbedding(config)
    module(torch.zeros(1), torch.arange(tokens)[None])  # dynamic and longrope follow the prompt
    rope = Rope.from_config(config, num_tokens=tokens)
    assert rope.inv_freq == pytest.approx(module.inv_freq.tolist(), rel=1e-6)
    assert rope.rotary_dim == 2 * len(module.inv_freq)
    assert not rope.interleaved


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> Any:
    """family -> (config, keys [Hkv, n, d] as its last layer caches them, the same before transformers' own rotation)."""

    def run(family: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
        name, fields = FAMILIES[family]
        config = getattr(transformers, name)(**{**TINY, **fields})
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        module = importlib.import_module(type(model).__module__)
        seen: list[torch.Tensor] = []
        rotate = module.apply_rotary_pos_emb

        def recorded(*given: torch.Tensor, **options: Any) -> Any:
            seen.append(given[1] if len(given) == 4 else given[0])  # (q, k, cos, sin), or (q or k, cos, sin): k last
            return rotate(*given, **options)

        monkeypatch.setattr(module, "apply_rotary_pos_emb", recorded)
        if family in STANDING:
            last = list(model.model.layers)[-1].self_attn
            source = last.k_norm if hasattr(last, "k_norm") else last.k_proj
            source.register_forward_hook(
                lambda _module, _given, out: seen.append(out if out.dim() == 4 else out.view(1, TOKENS, -1, config.head_dim))
            )
        with torch.no_grad():
            keys = model(torch.arange(TOKENS)[None] + 3, use_cache=True).past_key_values.layers[-1].keys[0]
        before = seen[-1][0]
        return config, keys, before if before.shape[:2] == keys.shape[:2] else before.transpose(0, 1)

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_unrotating_what_a_model_caches_gives_its_keys_before_rotation(family: str, cached: Any) -> None:
    config, keys, before = cached(family)
    rope = Rope.from_config(config, num_tokens=TOKENS)
    plain = torch.stack([unrotate(head, torch.arange(TOKENS), rope) for head in keys])
    turned = rope.rotary_dim
    assert torch.equal(plain[..., turned:], keys[..., turned:].double())
    # yarn and longrope scale what they rotate, nanochat normalizes afterwards: what counts is the direction
    wanted = torch.nn.functional.normalize(before[..., :turned].double(), dim=-1)
    assert_same_direction(plain[..., :turned], wanted)
    other_layout = Rope(rope.inv_freq, turned, interleaved=not rope.interleaved)
    if any(rope.inv_freq):
        with pytest.raises(AssertionError):
            assert_same_direction(torch.stack([unrotate(head, torch.arange(TOKENS), other_layout) for head in keys]), wanted)


def assert_same_direction(keys: torch.Tensor, wanted: torch.Tensor) -> None:
    given = torch.nn.functional.normalize(keys[..., : wanted.shape[-1]], dim=-1)
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-5)


# families whose source rotates interleaved: refused by from_config (latent attention), or without a cache of prompt tokens
REFUSED = {"axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots3_note",
           "glm4_moe_lite", "glm_moe_dsa", "hy_v4_vl", "longcat_flash", "mistral4", "mistral_large4", "youtu"}  # fmt: skip
NO_CACHE = {"edgetam_video", "efficientloftr", "lightglue", "musicflamingo", "openai_privacy_filter", "roformer", "sam2_video",
            "sam3", "sam3_tracker_video"}  # fmt: skip


def _rotates_interleaved(source: str) -> bool:
    if "::2]" not in source and "view_as_complex" not in source:
        return False
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    texts = [ast.unparse(node) for node in functions if "rotat" in node.name or "rotary" in node.name]
    return any("::2]" in text or "view_as_complex" in text for text in texts)


def test_no_family_of_transformers_rotates_interleaved_unknown_to_us() -> None:
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    found = {path.parent.name for path in files if _rotates_interleaved(path.read_text())}
    known = {name.removesuffix("_text") for name in INTERLEAVED} | {"blt"}
    assert {"cohere", "glm", "gptj", "llama4"} <= found, "the search finds what it is for"
    new = found - known - REFUSED - NO_CACHE
    if new and version.parse(transformers.__version__) > version.parse(READ):
        pytest.skip(f"transformers {transformers.__version__} has families nobody has read yet: {', '.join(sorted(new))}")
    assert new == set(), "new families: to INTERLEAVED, or refused by name"


def refused(argument: str, match: str, config: Any, **options: Any) -> None:
    with pytest.raises(InvalidInputError, match=match) as caught:
        Rope.from_config(config, **options)
    assert caught.value.argument == argument


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rope_that_follows_the_prompt_needs_its_length(kind: str) -> None:
    refused("num_tokens", "the prompt's length", llama(kind))
    refused("num_tokens", "the prompt's length", llama(kind), num_tokens=0)


@pytest.mark.parametrize(("changes", "match"), [
    ({"rope_parameters": {"rope_type": "spiral"}}, "spiral.*similarity_keys"),
    ({"rope_parameters": {"main": {"rope_theta": 1.0}, "compress": {}}}, "main, compress.*similarity_keys"),
    ({"rope_parameters": None}, "missing.*similarity_keys"),
    ({"qk_rope_head_dim": 8}, "latent.*similarity_keys"),
    ({"no_rope_layers": [1, 1, 0]}, "some of the full-attention.*similarity_keys"),
    ({"model_type": "hunyuan_v1_dense"}, "learned norm.*similarity_keys"),
    ({"layer_rope_theta": [10000.0, 0]}, "layer to layer.*similarity_keys"),
    ({"alibi": True}, "switched off.*similarity_keys"),
    ({"position_embedding_type": None}, "switched off.*similarity_keys"),
])  # fmt: skip
def test_a_rope_that_none_can_express_names_the_way_out(changes: dict[str, Any], match: str) -> None:
    usual = {"rope_parameters": {"rope_theta": 10000.0}, "hidden_size": 64, "num_attention_heads": 4}
    refused("rope", match, SimpleNamespace(**{**usual, **changes}))


def test_a_missing_setting_is_named() -> None:
    usual = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    for kind, name in (("linear", "factor"), ("llama3", "factor"), ("dynamic", "factor"), ("longrope", "short_factor")):
        settings = {"rope_type": kind, "rope_theta": 10000.0}
        refused(f"rope.{name}", name, SimpleNamespace(rope_parameters=settings, **usual), num_tokens=9)


def test_interleaved_overrules_what_the_family_does() -> None:
    assert Rope.from_config(llama("default"), interleaved=True).interleaved
    cohere = transformers.CohereConfig(**TINY)
    assert Rope.from_config(cohere).interleaved
    assert not Rope.from_config(cohere, interleaved=False).interleaved


def test_configs_of_before_transformers_5_are_read_too() -> None:
    old = SimpleNamespace(
        hidden_size=64, num_attention_heads=4, rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 4.0}
    )
    assert Rope.from_config(old) == Rope.from_config(llama("linear"))
    assert Rope.from_config(SimpleNamespace(text_config=old)) == Rope.from_config(old)
