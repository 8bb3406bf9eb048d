"""The demo's options, checked before anything is loaded: a mistake costs a second, not a minute. Knows no torch."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from graphkv import InvalidInputError, Policy
from main_job.errors import DemoError


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for. budget: tokens (int) or the share kept (float); questions: empty for the built-in ones."""

    budget: int | float
    prompt_file: Path | None
    questions: tuple[str, ...]
    question_inside: bool
    json: Path | None
    address: str | None


def checked(given: argparse.Namespace) -> Options:
    """The options; DemoError says which one is wrong."""
    if given.prompt_file is not None and not given.prompt_file.is_file():
        raise DemoError(f"--prompt-file {given.prompt_file}: there is no such file")
    if given.json is not None and (given.json.is_dir() or not os.access(given.json.parent, os.W_OK)):
        raise DemoError(f"--json {given.json}: it cannot be written to")
    questions = tuple(question.strip() for question in given.question or ())
    if "" in questions:
        raise DemoError("--question is empty")
    return Options(_budget(given.budget), given.prompt_file, questions, given.question_inside, given.json, given.address)


def _budget(given: str) -> int | float:
    try:
        budget = float(given) if "." in given else int(given)
        Policy(budget)
    except (ValueError, InvalidInputError):
        allowed = "a number of tokens, at least 1, or with a point the share that is kept, such as 0.1"
        raise DemoError(f"--budget {given}: it must be {allowed}") from None
    return budget
