"""Structured logs: one JSON object a line on standard error, whatever a caller sends.

Never logs tensors, indices, tokens or credentials: the fields of an event are written by our code, and the one word of a
caller that appears, the request id, is matched against a pattern or replaced. A failing log never fails a request.
"""

import json
import logging
import re
import secrets
import sys
import time
from typing import Any, TextIO

__all__ = ["configure", "event", "safe_id"]

_LOGGER = logging.getLogger("graphkv_server")
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LONGEST_TEXT = 1000


def safe_id(given: str) -> str:
    """The caller's request id where it is one (`[A-Za-z0-9._-]{1,64}`), else a fresh one."""
    return given if _SAFE_ID.fullmatch(given) else secrets.token_hex(8)


def event(name: str, *, level: str = "info", **fields: Any) -> None:
    """Logs what happened, `name`, with plain fields (numbers, short strings, None left out)."""
    number = getattr(logging, level.upper())
    if _LOGGER.isEnabledFor(number):
        _LOGGER.log(number, name, extra={"fields": fields})


def configure(level: str, stream: TextIO | None = None) -> None:
    """Sends this package's events, and the warnings of the libraries below it, to `stream` (standard error) as JSON lines."""
    handler = _Stream(sys.stderr if stream is None else stream)
    handler.setFormatter(_JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    _LOGGER.setLevel(getattr(logging, level.upper()))
    logging.captureWarnings(True)


class _JsonLines(logging.Formatter):
    """One line a record: json escapes line breaks and control characters, and long texts are cut."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": _cut(record.getMessage()),
        }
        if record.name != _LOGGER.name:
            line["logger"] = record.name
        for name, value in getattr(record, "fields", {}).items():
            if value is not None:
                line[name] = value if isinstance(value, bool | int | float) else _cut(str(value))
        if record.exc_info:
            line["error"] = _cut(self.formatException(record.exc_info), 8 * _LONGEST_TEXT)
        return json.dumps(line, ensure_ascii=True)


class _Stream(logging.StreamHandler[TextIO]):
    """A full disk or a closed stream loses lines, nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's own name
        """Says nothing: the place to say it is the one that failed."""


def _cut(text: str, length: int = _LONGEST_TEXT) -> str:
    return text if len(text) <= length else text[:length] + "..."
