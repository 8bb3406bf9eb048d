"""The demo's model, which `graphkv inspect` reads too; what is missing is said in the demo's words."""

from collections.abc import Callable

from graphkv_client.integrations import smollm2
from graphkv_client.integrations.smollm2 import Loaded, cache_folder
from graphkv_client.integrations.smollm2 import keep as _keep
from graphkv_client.integrations.smollm2 import read as _read

from main_job.errors import EXTRA, DemoError

__all__ = ["Loaded", "_keep", "_read", "cache_folder", "load"]


def load(say: Callable[[str], None] = lambda text: None) -> Loaded:
    """The model and its tokenizer; DemoError where something it needs is missing."""
    try:
        return smollm2.load(say)
    except ImportError as error:
        raise DemoError(f"{EXTRA} ({error})") from error
    except smollm2.WeightsError as error:
        raise DemoError(f"{error}, or run ./dev demo") from error
