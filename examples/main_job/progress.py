"""One line on a terminal that says what is going on; nothing at all in a pipe."""

import contextlib
import time
from collections.abc import Iterator
from typing import TextIO


class Progress:
    """Writes to `out` where that is a terminal. `seconds`: how long each finished step took, by its name."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown = out.isatty()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        """Shows `text` for as long as the block runs, then how long it took."""
        started = time.perf_counter()
        self.note(text)
        yield
        self.seconds[name] = time.perf_counter() - started
        if self._shown:
            self._out.write(f"\r\x1b[K{text}: {self.seconds[name]:.1f} s\n")
            self._out.flush()

    def note(self, text: str) -> None:
        """Replaces the line."""
        if self._shown:
            self._out.write(f"\r\x1b[K{text} ...")
            self._out.flush()

    def clear(self) -> None:
        """Empties the line."""
        if self._shown:
            self._out.write("\r\x1b[K")
            self._out.flush()
