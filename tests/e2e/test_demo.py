"""The demo as a user runs it: in a pipe, on the real model, with its mistakes; and that it leaves no process behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from graphkv_testing.process import serve, wait_until
from graphkv_testing.smollm2 import needs_model

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["Full cache", "Last tokens only", "SnapKV", "GraphKV paper", "GraphKV default", "GraphKV sequential"]

pytestmark = pytest.mark.timeout(400)


def start(*options: str, **environment: str) -> "subprocess.Popen[str]":
    """The demo, its output in pipes; every process it starts inherits the mark."""
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), *options]
    own = {**os.environ, "DEMO_TEST_MARK": str(os.getpid()), **environment}
    # A test run in the background ignores Ctrl-C, and its children would inherit that. Not by preexec_fn, which forks: gRPC's
    # threads of this process then write into the child's stderr.
    heeds = ["env", "--default-signal=INT"] if sys.platform == "linux" else []
    return subprocess.Popen([*heeds, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own)


def demo(*options: str) -> tuple[int, str, str]:
    process = start(*options)
    out, err = process.communicate(timeout=390)
    return process.returncode, out, err


def left_behind() -> list[int]:
    """The processes that a demo of this test run started and that still live."""
    mark, found = f"DEMO_TEST_MARK={os.getpid()}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile, or is not ours; a zombie's is empty
            continue
    return found


@needs_model
def test_six_methods_on_a_real_prompt(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    code, out, err = demo("--budget", "257", "--json", str(file), "--question", "What does the assert statement do?")
    assert (code, err) == (0, "")
    assert left_behind() == []
    figures: dict[str, Any] = json.loads(file.read_text())
    assert figures["prompt_tokens"] >= 3000
    assert figures["budget"] == 257
    methods = {method["name"]: method for method in figures["methods"]}
    assert list(methods) == NAMES
    full = methods["Full cache"]
    assert full["kept_tokens"] == figures["prompt_tokens"]
    assert [method["kept_tokens"] for method in figures["methods"][1:]] == [257] * 5
    bytes_a_token = 30 * 3 * 64 * 4 * 2
    assert all(method["kept_bytes"] == method["kept_tokens"] * bytes_a_token for method in figures["methods"])
    assert [method["sent_bytes"] > 0 for method in figures["methods"]] == [False, False, True, True, True, True]
    assert methods["GraphKV sequential"]["sent_bytes"] < methods["GraphKV paper"]["sent_bytes"] / 2
    assert methods["SnapKV"]["text_loss_over_full"] < methods["Last tokens only"]["text_loss_over_full"]
    assert methods["SnapKV"]["not_kept_by_snapkv"] is None
    for name in NAMES[3:]:
        assert 0 < methods[name]["not_kept_by_snapkv"]["tokens"] < methods[name]["not_kept_by_snapkv"]["slots"] == 257 * 90
        assert methods[name]["not_kept_by_snapkv"]["more"]
    assert all(name in out for name in NAMES)
    assert max(map(len, out.splitlines())) <= 120


@needs_model
def test_a_budget_beyond_the_prompt_answers_as_the_full_cache_does(tmp_path: Path) -> None:
    prompt, file = tmp_path / "prompt.txt", tmp_path / "figures.json"
    prompt.write_text("Ada keeps bees, Berta keeps goats and Carl keeps nothing at all. It rained on most days. " * 40)
    code, _, err = demo("--prompt-file", str(prompt), "--budget", "4000", "--json", str(file), "--question", "Who keeps bees?")
    assert (code, err) == (0, "")
    figures = json.loads(file.read_text())
    texts = {method["answers"][0]["answer"] for method in figures["methods"]}
    assert len(texts) == 1
    assert {method["kept_tokens"] for method in figures["methods"]} == {figures["prompt_tokens"]}
    assert {method["sent_bytes"] for method in figures["methods"]} == {0}
    assert left_behind() == []


@needs_model
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_stopped_once_its_server_has_started_it_takes_it_along(number: signal.Signals) -> None:
    process = start()
    try:
        assert wait_until(lambda: len(left_behind()) == 2, 120), "the server never started"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert out == ""
    assert "Traceback" not in err
    assert wait_until(lambda: left_behind() == [])


@needs_model
def test_stopped_in_its_prefill_it_gives_back_what_it_held_in_the_service() -> None:
    with serve() as server:
        process = start("--address", server.address)
        try:
            assert wait_until(lambda: server.metric("graphkv_in_flight_requests") > 0, 120), "the prefill never started"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert (process.returncode, out, err) == (130, "", "demo: stopped\n")
        assert server.settled()
        outcomes = server.outcomes()
        assert outcomes.get("abandoned", 0) > 0, outcomes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "0"], "--budget 0: it must be a number of tokens, at least 1"),
        (["--budget", "1.5"], "--budget 1.5"),
        (["--budget", "many"], "--budget many"),
        (["--prompt-file", "/nowhere/at/all.txt"], "there is no such file"),
        (["--json", "/nowhere/at/all.json"], "cannot be written"),
        (["--question", " "], "--question is empty"),
    ],
    ids=["budget-0", "ratio-above-1", "no-number", "no-file", "no-folder", "no-question"],
)
def test_a_mistake_gets_one_sentence(options: list[str], said: str) -> None:
    code, out, err = demo(*options)
    assert code == 2
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("missing", ["torch", "transformers", "gguf"])
def test_a_missing_extra_gets_one_sentence(missing: str) -> None:
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv = ['demo.py']; runpy.run_path('demo.py', run_name='__main__')"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "examples", timeout=120, check=False
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert "pip install 'graphkv[demo]'" in process.stderr
    assert len(process.stderr.splitlines()) == 1


@needs_model
@pytest.mark.parametrize(
    ("words", "said"), [(20, "needs at least"), (9000, "window has room for")], ids=["too-short", "too-long"]
)
def test_a_prompt_of_the_wrong_length_gets_one_sentence(words: int, said: str, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("word " * words)
    code, out, err = demo("--prompt-file", str(prompt))
    assert code == 2
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1


@needs_model
def test_an_address_where_nobody_answers_gets_one_sentence() -> None:
    code, out, err = demo("--address", "127.0.0.1:9")
    assert code == 2
    assert out == ""
    assert "no service answers at 127.0.0.1:9" in err
    assert len(err.splitlines()) == 1
