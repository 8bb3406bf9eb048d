"""Real long texts of three kinds that are on every machine that can run the benchmark; nothing is downloaded.

Knows no tokenizer and no task.
"""

import inspect
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

__all__ = ["KINDS"]

MODULES = (
    "argparse ast bdb calendar cmd codecs configparser copy csv dataclasses difflib dis doctest enum fractions ftplib functools "
    "gettext heapq imaplib inspect ipaddress locale mailbox mimetypes optparse pdb pickle pickletools platform pprint profile "
    "random shutil smtplib socket socketserver statistics subprocess tarfile tempfile textwrap threading tokenize trace "
    "traceback turtle typing uuid warnings weakref webbrowser zipfile"
)
LEAST = 600  # characters: shorter docstrings are mere signatures


def reference() -> str:
    """Python's language reference, topic by topic."""
    return "\n\n\n".join(text.strip() for _, text in sorted(pydoc_data.topics.topics.items()))


def code() -> str:
    """Modules of the standard library, one after the other."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = (folder / f"{name}.py" for name in MODULES.split())
    return "\n\n\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def documentation() -> str:
    """numpy's own documentation: prose, formulas and examples, a function at a time."""
    return "\n\n\n".join(dict.fromkeys(_docstrings()))


def _docstrings() -> Iterator[str]:
    for place in (np, np.linalg, np.fft, np.random, np.polynomial.chebyshev, np.ma):
        for name in sorted(dir(place)):
            found = getattr(place, name)
            if not name.startswith("_") and (callable(found) or inspect.ismodule(found)):
                text = inspect.getdoc(found) or ""
                if len(text) >= LEAST:
                    yield text


KINDS: Mapping[str, Callable[[], str]] = MappingProxyType(
    {"reference": reference, "code": code, "documentation": documentation}
)
