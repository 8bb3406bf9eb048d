"""`graphkv` as a user runs it: a page of a real prompt, and one sentence for each mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from graphkv_testing.smollm2 import needs_model

from graphkv import Policy


def graphkv(*arguments: str | Path, cwd: Path | None = None) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "graphkv_client.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def embedded(page: Path) -> dict:
    found = re.search(r'<script id="record" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


@needs_model
def test_a_page_of_a_real_prompt(tmp_path: Path) -> None:
    prompt, own, page = tmp_path / "bees.txt", tmp_path / "own.json", tmp_path / "page.html"
    prompt.write_text("Ada keeps bees 🐝, Berta keeps goats.\n" * 30)
    fields = {name: value for name, value in Policy.paper(1).to_dict().items() if name != "budget"}
    own.write_text(json.dumps(fields))
    options = ("--prompt-file", prompt, "--question", "Who keeps bees?", "--budget", "0.25", "--against", own)
    code, out, err = graphkv("inspect", *options, "--output", page)
    assert (code, err) == (0, "")
    assert out.startswith(f"{page}: ")
    data = embedded(page)
    text = "".join(data["tokens"])
    assert prompt.read_text() in text
    assert "Question: Who keeps bees?" in text
    n = len(data["tokens"])
    assert n > 300
    assert (data["layers"], data["heads"]) == (30, 3)
    assert [policy["name"] for policy in data["policies"]] == ["sequential", "own"]
    assert [set(policy["budgets"]) for policy in data["policies"]] == [{n // 4}] * 2


@needs_model
def test_only_the_first_tokens_and_only_one_policy(tmp_path: Path) -> None:
    page = tmp_path / "inspect.html"
    code, _, err = graphkv("inspect", "--tokens", "64", "--budget", "40", "--against", "none", cwd=tmp_path)
    assert (code, err) == (0, "")
    data = embedded(page)
    assert (len(data["tokens"]), len(data["policies"])) == (64, 1)


@needs_model
def test_a_prompt_beyond_the_models_window_gets_one_sentence(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("word " * 9000)
    code, out, err = graphkv("inspect", "--prompt-file", prompt, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert "it must have 2 to 8192 (--tokens cuts it)" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "0"], "budget is 0; it must be a positive integer"),
        (["--budget", "many"], "--budget many"),
        (["--policy", "best"], "--policy best: it must be one of sequential, default, paper"),
        (["--against", "nowhere.json"], "--against nowhere.json: No such file"),
        (["--policy", "empty.json"], "--policy empty.json"),
        (["--policy", "list.json"], "it must hold one JSON object"),
        (["--policy", "wrong.json"], "strenght"),
        (["--policy", "given.json"], "the scorer given needs more than"),
        (["--policy", "layer.json"], "--policy layer.json: granularity layer cannot be shown"),
        (["--against", "pages.json"], "--against pages.json: page_size 16 cannot be shown"),
        (["--policy", "cake.json"], "--policy cake.json: budget_allocation cake cannot be shown"),
        (["--policy", "ragged.json"], "--policy ragged.json: budget_allocation adaptive_heads cannot be shown"),
        (["--prompt-file", "nowhere.txt"], "there is no such file"),
        (["--tokens", "0"], "--tokens 0"),
        (["--model", "."], "it must be a folder with a model's config.json"),
        (["--output", "nowhere/page.html"], "cannot be written"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_sentence(options: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "given.json").write_text('{"scorer": "given"}')
    (tmp_path / "wrong.json").write_text('{"graph": {"strenght": 1}}')
    (tmp_path / "layer.json").write_text('{"granularity": "layer"}')
    (tmp_path / "pages.json").write_text('{"page_size": 16}')
    (tmp_path / "cake.json").write_text('{"budget_allocation": "cake"}')
    (tmp_path / "ragged.json").write_text('{"budget_allocation": "adaptive_heads"}')
    code, out, err = graphkv("inspect", *options, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("graphkv inspect: ")
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("missing", ["torch", "transformers", "gguf"])
def test_a_missing_extra_gets_one_sentence(missing: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from graphkv_client.cli import main; sys.exit(main(['inspect']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'graphkv[inspect]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_line_is_light_until_it_is_used() -> None:
    code = (
        "import sys, graphkv_client.cli; sys.exit(str({'torch', 'transformers', 'graphkv.algorithm'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip() == ""
