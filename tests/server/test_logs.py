"""Logs: one JSON object a line whatever is in it; ids that are not ids are replaced; a failing stream fails nothing."""

import contextlib
import io
import json
import logging
from collections.abc import Iterator

import pytest
from graphkv_server import logs


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("info", stream)
    yield stream
    root.handlers[:], level = before
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.mark.parametrize("given", ["a", "A.b_c-9", "x" * 64])
def test_ids_pass(given: str) -> None:
    assert logs.safe_id(given) == given


@pytest.mark.parametrize(
    "given", ["", "x" * 65, "a b", "a\nb", "a\x00", "\x1b[31m", "ä", "a" * 2**20, "a\n"],
    ids=["empty", "long", "space", "newline", "nul", "ansi", "umlaut", "a MiB", "newline at the end"],
)  # fmt: skip
def test_what_is_no_id_is_replaced_by_one(given: str) -> None:
    made = logs.safe_id(given)
    assert made != given
    assert logs.safe_id(made) == made
    assert logs.safe_id(given) != made


@pytest.mark.parametrize("text", ["plain", "two\nlines", "\x1b[31mred", "nul\x00", "x" * 10**6, "\u2028"])
def test_one_line_of_json_an_event_whatever_is_in_it(lines: io.StringIO, text: str) -> None:
    logs.event("call", outcome=text, seconds=0.25, request_id=None)
    written = lines.getvalue()
    assert written.count("\n") == 1
    assert len(written) < 2000
    assert "\x1b" not in written
    line = json.loads(written)
    assert line["event"] == "call"
    assert line["seconds"] == 0.25
    assert "request_id" not in line
    assert line["outcome"][:5] == text[:5]


def test_libraries_and_exceptions_are_lines_too(lines: io.StringIO) -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        logging.getLogger("grpc").exception("broken\npipe")
    line = json.loads(lines.getvalue())
    assert line["logger"] == "grpc"
    assert "ValueError" in line["error"]


def test_levels(lines: io.StringIO) -> None:
    logs.event("quiet", level="debug")
    logging.getLogger("some.library").info("chatter")
    assert lines.getvalue() == ""
    logs.event("loud", level="error")
    assert json.loads(lines.getvalue())["level"] == "error"


def test_a_full_disk_fails_no_call(lines: io.StringIO, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:  # closing it fails, too
        logs.configure("info", full)
        logs.event("call")
        assert capfd.readouterr().err == ""
