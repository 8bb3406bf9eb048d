"""What the model reads and what it is asked: token ids of the prompt, of the text that follows, of the questions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from graphkv_client.integrations.smollm2 import chat_frame, reference_text

from main_job.errors import DemoError

HELD_OUT = 256  # tokens of the text that the model does not see: the known continuation
PROMPT_TOKENS = 3072  # of the built-in text
LEAST_TOKENS = 256
ROOM = 256  # for a question and its answer


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and a word that a right answer has; None where nobody knows."""

    text: str
    answer: str | None = None

    def right(self, given: str) -> bool | None:
        """Whether `given` has the word."""
        return None if self.answer is None else self.answer.lower() in given.lower()


# All three are answered in the text, and the full cache gets them right: at its beginning, in its middle, near its end.
QUESTIONS = (
    Question('Which PEP describes the "with" statement?', "343"),
    Question("What is a directive to the parser?", "global"),
    Question("How many types of numeric literals are there?", "three"),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """ids int64 [1, n]: what is prefilled. held_out int64 [1, 256]: how the text goes on; empty where a question follows.

    text: of the n tokens, and spans[i], the characters of token i in it.
    """

    ids: torch.Tensor
    held_out: torch.Tensor
    text: str
    spans: list[tuple[int, int]]

    @property
    def tokens(self) -> int:
        """n."""
        return self.ids.shape[1]


class Reader:
    """Turns text into prompts, by the model's own chat template."""

    def __init__(self, tokenizer: Any, window: int) -> None:
        self._tokenizer = tokenizer
        self._window = window
        self._header, self._footer = chat_frame(tokenizer)

    def prompt(self, file: Path | None, question: Question | None) -> Prompt:
        """The built-in text or the file's, as the beginning of a user's message; with the question behind it, if any."""
        text, limit = self._source(file)
        encoded = self._tokenizer(self._header + text, return_offsets_mapping=True, add_special_tokens=False)
        ids = torch.tensor(encoded.input_ids)
        n = min(limit, len(ids) - HELD_OUT)
        if n < LEAST_TOKENS:
            raise DemoError(f"{file} has {len(ids)} tokens; the demo needs at least {LEAST_TOKENS + HELD_OUT}")
        if n + HELD_OUT + ROOM > self._window:
            most = self._window - ROOM
            raise DemoError(f"{file} has {len(ids)} tokens; the model's window has room for {most}")
        spans, held_out = list(encoded.offset_mapping)[:n], ids[n : n + HELD_OUT]
        shown = (self._header + text)[: spans[-1][1]]
        if question is not None:
            asked = self._tokenizer(self._asked(question), return_offsets_mapping=True, add_special_tokens=False)
            spans += [(start + len(shown), stop + len(shown)) for start, stop in asked.offset_mapping]
            shown += self._asked(question)
            ids, held_out = torch.cat([ids[:n], torch.tensor(asked.input_ids)]), ids[:0]
            n = len(ids)
        return Prompt(ids[None, :n], held_out[None], shown, spans)

    def question(self, question: Question) -> torch.Tensor:
        """int64 [1, m]: what is fed after the prompt, up to where the answer begins."""
        return torch.tensor([self._tokenizer(self._asked(question), add_special_tokens=False).input_ids])

    def decode(self, ids: list[int]) -> str:
        """The text of an answer."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _asked(self, question: Question) -> str:
        return f"\n\nQuestion: {question.text}{self._footer}"

    def _source(self, file: Path | None) -> tuple[str, int]:
        if file is None:
            return reference_text(), PROMPT_TOKENS
        try:
            return file.read_text(encoding="utf-8"), self._window * 1000
        except OSError as error:
            raise DemoError(f"--prompt-file {file}: {error.strerror or error}") from error
        except UnicodeDecodeError:
            raise DemoError(f"--prompt-file {file} is not UTF-8 text") from None
