"""`graphkv inspect`'s page in a real browser: nothing complains, and what a user does with it shows. `./dev test-browser`."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graphkv_testing.chromium import Browser, chromium
from graphkv_testing.smollm2 import activations, model, needs_model, prompt_ids

from graphkv import Graph, Policy
from graphkv.inspector import PolicyRecord, record, write_page

SHOTS = Path(os.environ["GRAPHKV_SHOTS"]) if "GRAPHKV_SHOTS" in os.environ else None
BUDGET = 128
TIMES = "\N{MULTIPLICATION SIGN}"

pytestmark = [needs_model, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def records() -> list[PolicyRecord]:
    real = activations(601)
    given: dict[str, Any] = {"keys": real.keys, "queries": real.queries, "rope": real.rope}
    return [
        record(**given, policy=Policy.sequential(BUDGET, budget_allocation="pyramid"), name="sequential"),
        record(**given, policy=Policy(BUDGET, graph=Graph(threshold=0.6)), name="threshold"),
    ]


@pytest.fixture(scope="module")
def page(records: list[PolicyRecord], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = [model().tokenizer.decode([token]) for token in prompt_ids(601)[0].tolist()]
    file = tmp_path_factory.mktemp("page") / "inspect.html"
    file.write_text(write_page(tokens, records, title="the with statement"))
    return file


@pytest.fixture(scope="module")
def running() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def browser(running: Browser, page: Path, request: pytest.FixtureRequest) -> Iterator[Browser]:
    running.complaints.clear()
    running.requests.clear()
    running.open(page)
    yield running
    if SHOTS is not None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        running.screenshot(SHOTS / f"{request.node.name}.png")
    assert running.complaints == []
    assert set(running.requests) <= {page.resolve().as_uri(), "data:,"}


def classes(browser: Browser, name: str, place: int = 0) -> list[int]:
    """The tokens of one pane that carry a class."""
    found = f"[...document.querySelectorAll('.block:nth-child({place + 1}) .{name}')].map(span => span.token)"
    return sorted(browser.value(found))


def text(browser: Browser, selector: str) -> str:
    return str(browser.value(f"document.querySelector({json.dumps(selector)}).innerText"))


def slide(browser: Browser, selector: str, value: int) -> None:
    box = f"document.querySelector('{selector}')"
    browser.value(f"{box}.value = {value}; {box}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def test_shows_what_the_record_keeps(browser: Browser, records: list[PolicyRecord]) -> None:
    layer = records[0].layers[15]
    always = {token for start, stop in layer.always for token in range(start, stop)}
    kept = set(layer.rows[0].kept.nonzero()[0].tolist())
    assert set(classes(browser, "a")) == always
    assert set(classes(browser, "k")) == kept - always
    assert f"Kept\n{len(kept)} of 601" in text(browser, "#row")


def test_a_click_on_a_kept_token_tells_whom_it_lowered(browser: Browser, records: list[PolicyRecord]) -> None:
    row = records[0].layers[15].rows[0]
    token = int(row.sources[3])
    browser.click(f"#t0-{token}")
    assert classes(browser, "sel") == [token]
    shown = browser.value("document.querySelectorAll('#token .list button').length")
    expected = row.neighbors.tokens[3][:shown].tolist()
    assert browser.value("data.listed") == shown == 24
    assert sorted(classes(browser, "n1") + classes(browser, "n2") + classes(browser, "n3") + classes(browser, "n4")) == sorted(
        expected
    )
    told = text(browser, "#token")
    assert f"kept, choice 4 of {len(row.sources)}" in told
    assert f"{row.neighbors.similarity[3, 0]:.3f}" in told
    assert f"{TIMES} {1 - 0.1 * row.neighbors.similarity[3, 0]:.3f}" in told
    browser.click("#token .list li:nth-child(2) button")
    assert classes(browser, "sel") == expected[:1]


def test_a_click_on_a_dropped_token_tells_who_lowered_it(browser: Browser, records: list[PolicyRecord]) -> None:
    row = records[0].layers[15].rows[0]
    token = next(int(each) for each in row.candidates if not row.kept[each] and each in row.neighbors.tokens)
    browser.click(f"#t0-{token}")
    told = text(browser, "#token")
    assert "dropped" in told
    assert "Who lowered it" in told
    near = {token for level in range(1, 5) for token in classes(browser, f"n{level}")}
    assert near
    assert near <= set(row.sources.tolist())


def test_the_slider_walks_the_order_of_choice(browser: Browser, records: list[PolicyRecord]) -> None:
    row = records[0].layers[15].rows[0]
    slide(browser, "#step", 10)
    assert set(classes(browser, "k")) == set(row.sources[:10].tolist())
    assert set(classes(browser, "later")) == set(row.sources[10:].tolist())
    assert classes(browser, "sel") == [row.sources[9]]
    assert text(browser, "#step-out").startswith(f"10 of {len(row.sources)}: ")
    browser.press("]")
    assert classes(browser, "sel") == [row.sources[10]]
    slide(browser, "#step", 0)
    assert classes(browser, "k") == []


def test_the_order_of_choice_plays_and_stops(browser: Browser) -> None:
    browser.click("#play")
    browser.wait("Number(document.getElementById('step').value) >= 3 && Number(document.getElementById('step').value) < 50")
    browser.click("#play")
    stopped = browser.value("document.getElementById('step').value")
    browser.value("new Promise(done => setTimeout(done, 400))")
    assert browser.value("document.getElementById('step').value") == stopped


def test_the_policies_fields_are_told(browser: Browser) -> None:
    told = str(browser.value("document.getElementById('fields').textContent"))
    assert "budget allocationpyramid" in told
    assert "similaritypre_rope" in told
    assert "threshold0.6" in told


def test_layer_and_head_follow_slider_buttons_keys_and_the_plot(browser: Browser, records: list[PolicyRecord]) -> None:
    slide(browser, "#layer", 3)
    browser.click("#head button[value='2']")
    assert text(browser, "#row h2") == "Layer 3, KV head 2"
    browser.press(".")
    browser.press("h")
    assert text(browser, "#row h2") == "Layer 4, KV head 0"
    browser.click("#plot [data-row='88'] .hit")
    assert text(browser, "#row h2") == "Layer 29, KV head 1"
    kept = records[0].layers[29].rows[1].kept.nonzero()[0].tolist()
    assert sorted(classes(browser, "k") + classes(browser, "a")) == kept
    heights = browser.value(
        "[...document.querySelectorAll('#plot .hit + title')].map(t => Number(t.textContent.match(/: ([\\d,]+) kept/)[1]))"
    )
    assert heights == [int(row.kept.sum()) for row in records[0].rows]


def test_two_policies_side_by_side(browser: Browser, records: list[PolicyRecord]) -> None:
    browser.click("#view button[value='both']")
    first, second = (set(entry.layers[15].rows[0].kept.nonzero()[0].tolist()) for entry in records)
    assert set(classes(browser, "only", 0)) == first - second
    assert set(classes(browser, "only", 1)) == second - first
    assert f"Kept by both\n{len(first & second)}" in text(browser, "#row")
    tops = browser.value(
        "[0, 300, 600].map(i => ['t0-', 't1-'].map(t => Math.round(document.getElementById(t + i).getClientRects()[0].top)))"
    )
    assert all(left == right for left, right in tops), "the panes stay level"
    browser.press("d")
    assert classes(browser, "sel") == [min(first ^ second)]


def test_a_one_shot_policy_marks_its_sources_and_has_no_slider(browser: Browser, records: list[PolicyRecord]) -> None:
    browser.click("#view button[value='1']")
    row = records[1].layers[15].rows[0]
    assert set(classes(browser, "src")) == set(row.sources.tolist())
    assert not browser.value("document.getElementById('step').checkVisibility()")
    place = int(row.neighbors.counts.argmax())
    assert row.neighbors.counts[place] > 0
    browser.click(f"#t1-{row.sources[place]}")
    similarity = row.neighbors.similarity[place, 0]
    assert f"{similarity:.3f}\n{TIMES} {1 - similarity:.3f}" in text(browser, "#token .list")


def test_the_keyboard_alone_is_enough(browser: Browser, records: list[PolicyRecord]) -> None:
    row = records[0].layers[15].rows[0]
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        browser.press(key)
    assert classes(browser, "sel") == [1]
    browser.press("k")
    assert classes(browser, "sel") == [min(token for token in row.sources.tolist() if token > 1)]
    browser.press("v")
    assert browser.value("document.querySelector('#view [aria-pressed=true]').value") == "1"
    browser.press("Escape")
    assert classes(browser, "sel") == []


@pytest.mark.parametrize("shade", ["score", "updated", "lowered"])
def test_shades(browser: Browser, shade: str, records: list[PolicyRecord]) -> None:
    browser.value(f"Object.assign(document.getElementById('shade'), {{value: '{shade}'}}).dispatchEvent(new Event('change'))")
    row = records[0].layers[15].rows[0]
    darkest = set(classes(browser, "s8"))
    if shade == "lowered":
        assert int(row.candidates[row.factors.argmin()]) in darkest
    else:
        values = {"score": -row.scores[row.candidates], "updated": -row.updated}[shade]
        assert int(row.candidates[values.argsort(kind="stable")[0]]) in darkest


def test_dark_and_narrow(browser: Browser, page: Path) -> None:
    light = browser.value("getComputedStyle(document.body).backgroundColor")
    browser.click("#theme")
    dark = browser.value("getComputedStyle(document.body).backgroundColor")
    assert light != dark
    browser.open(page, dark=True)
    assert browser.value("getComputedStyle(document.body).backgroundColor") == dark
    browser.click("#theme")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == light
    browser.open(page, width=400)
    assert browser.value("document.documentElement.scrollWidth <= 400"), "nothing sticks out on a phone"


def test_4000_tokens_and_30_layers_stay_responsive(running: Browser, tmp_path: Path) -> None:
    """No step may take a second: a bound so wide that no machine's mood decides; the times are printed."""
    random = torch.Generator().manual_seed(0)
    heads = torch.randn(30, 3, 400, 64, generator=random)
    keys = heads[:, :, torch.randint(400, (4000,), generator=random)] + 0.5 * torch.randn(30, 3, 4000, 64, generator=random)
    queries = torch.randn(30, 9, 32, 64, generator=random)
    first = record(
        keys, queries=queries, policy=Policy(512, graph=Graph(update="sequential", candidates=2.0)), name="sequential"
    )
    second = record(keys, queries=queries, policy=Policy.snapkv(512), name="snapkv")
    file = tmp_path / "large.html"
    file.write_text(write_page([f" word{token}" + "\n" * (token % 12 == 0) for token in range(4000)], [first, second]))
    assert file.stat().st_size < 5 * 2**20
    running.open(file)
    spent = {}
    for act in ("go(3, 1)", "select(2000, 'center')", "setStep(100)", "setView('both')", "go(4, 2)", "setStep(200)"):
        frame = "await new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
        spent[act] = running.value(
            f"(async () => {{ const t = performance.now(); {act}; {frame}; return performance.now() - t; }})()"
        )
    print({act: f"{each:.0f} ms" for act, each in spent.items()})
    assert max(spent.values()) < 1000
