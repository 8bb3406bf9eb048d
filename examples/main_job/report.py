"""The demo's face: the table, the answers, the words that differ; and the same figures as JSON."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from main_job.methods import FULL, SNAPKV, Result
from main_job.text import Question

WIDTH = 118
SHOWN_WORDS = 9
MODEL = "SmolLM2-135M-Instruct, float32: 30 layers, 9 query heads, 3 KV heads of 64"
MEANING = """\
kept: per layer and KV head, and of the whole cache. sent: tensor bytes that went to the service. scoring (in this \
process) and choosing (in the service) ran while the prefill did, for all four policies at once; cut after: from the end \
of the prefill to the cut cache. text: nats a token on how the text goes on, answers: on the full cache's own answers; \
the full cache's loss, and how much more the others have. kept otherwise: slots (a token in one KV head of one layer) \
kept here and not by SnapKV."""
AFTERWARDS = """\
A budget spent before the question is known loses what nothing pointed at; --question-inside shows the other case. """
CAVEAT = """\
One prompt and a model of 135M parameters: this shows the path at work, it does not rank methods. What was measured on \
many prompts is in docs/algorithm.md."""


@dataclass(frozen=True, slots=True)
class Job:
    """What was done. budget: tokens per layer and KV head. seconds: by step, of those all methods share."""

    budget: int
    question_inside: bool
    prompt_tokens: int
    questions: Sequence[Question]
    address: str
    seconds: dict[str, float]


def table(job: Job, results: Sequence[Result]) -> str:
    """All of it as text, at most 118 columns wide."""
    unforeseen = not job.question_inside and job.budget < job.prompt_tokens
    parts = [
        _head(job),
        _figures(job, results),
        _fill(MEANING),
        _answers(job, results),
        _words(results),
        _fill(AFTERWARDS * unforeseen + CAVEAT),
    ]
    return "\n\n".join(part for part in parts if part)


def to_json(job: Job, results: Sequence[Result]) -> str:
    """The figures of `table`, unrounded."""
    full = _full(results)
    methods = []
    for result in results:
        answers = [
            {"question": question.text, "answer": text, "right": right}
            for question, text, right in zip(job.questions, result.answers, result.right, strict=True)
        ]
        entry = {
            "name": result.method.name,
            "kept_tokens": result.kept_tokens,
            "kept_bytes": result.kept_bytes,
            "sent_bytes": result.sent_bytes,
            "seconds": result.seconds,
            "kept_score_ratio": result.kept_score_ratio,
            "text_loss": result.text_loss,
            "text_loss_over_full": _over(result.text_loss, full.text_loss),
            "answer_loss": result.answer_loss,
            "answer_loss_over_full": _over(result.answer_loss, full.answer_loss),
            "answers": answers,
            "not_kept_by_snapkv": None if result.difference is None else asdict(result.difference),
        }
        methods.append(entry)
    shared = {name: job.seconds[name] for name in ("model", "service", "prefill") if name in job.seconds}
    whole = {
        "prompt_tokens": job.prompt_tokens,
        "budget": job.budget,
        "question_inside": job.question_inside,
        "seconds": shared,
        "methods": methods,
    }
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _head(job: Job) -> str:
    share = min(1.0, job.budget / job.prompt_tokens)
    asked = "inside the prefill" if job.question_inside else "after the cut"
    started = f"started in {job.seconds['service']:.1f} s" if "service" in job.seconds else "was running"
    return (
        f"{MODEL}\n"
        f"prompt {job.prompt_tokens:,} tokens, budget {job.budget:,} ({share:.0%}) per layer and KV head, question {asked}\n"
        f"model loaded in {job.seconds['model']:.1f} s; graphkv-serve at {job.address} {started}; "
        f"prefill {job.seconds['prefill']:.1f} s"
    )


def _figures(job: Job, results: Sequence[Result]) -> str:
    full = _full(results)
    head = [
        ["", "kept", "kept", "sent", "scoring", "choosing", "cut after", "asking", "text", "answers", "", "kept"],
        ["", "tokens", "MiB", "MiB", "s", "s", "s", "s", "nats", "nats", "right", "otherwise"],
    ]
    rows = []
    for result in results:
        own = result is full
        seconds = result.seconds
        served = "scoring" in seconds
        known = [value for value in result.right if value is not None]
        rows.append(
            [
                result.method.name,
                f"{result.kept_tokens:,}",
                f"{result.kept_bytes / 2**20:.1f}",
                f"{result.sent_bytes / 2**20:.1f}" if served else "-",
                f"{seconds['scoring']:.1f}" if served else "-",
                f"{seconds['choosing']:.1f}" if served else "-",
                "-" if own else f"{seconds.get('ready', seconds['cut']):.2f}",
                f"{seconds['answering']:.1f}",
                _nats(result.text_loss, None if own else full.text_loss),
                _nats(result.answer_loss, None if own else full.answer_loss),
                f"{sum(known)} of {len(known)}" if known else "-",
                "-" if result.difference is None else f"{result.difference.tokens / result.difference.slots:.0%}",
            ]
        )
    return "\n".join(_aligned([*head, *rows], rule_after=1))


def _answers(job: Job, results: Sequence[Result]) -> str:
    blocks = []
    width = max(len(result.method.name) for result in results)
    for place, question in enumerate(job.questions):
        lines = [question.text + (f"  (right: {question.answer})" if question.answer else "")]
        for result in results:
            mark = {True: "+", False: "-", None: " "}[result.right[place]]
            said = " ".join(result.answers[place].split()) or "(nothing)"
            lines.append(f"  {mark} {result.method.name:<{width}}  {_cut(said, WIDTH - width - 6)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _words(results: Sequence[Result]) -> str:
    lines = []
    for result in results:
        found = result.difference
        if found is None:
            continue
        differ = f"{found.tokens:,} of {found.slots:,} slots" if found.tokens else "the same slots"
        lines.append(f"  {result.method.name}: {differ}")
        for label, words in (("more", found.more), ("fewer", found.fewer)):
            if words:
                shown = "  ".join(f"{word} {count}" for word, count in words[:SHOWN_WORDS])
                lines.append(f"    {label:<6}{_cut(shown, WIDTH - 10)}")
    if not lines:
        return ""
    head = f"Kept otherwise than by {SNAPKV.name}: the words kept in more, and in fewer, of the slots, and in how many"
    return "\n".join([head, *lines])


def _full(results: Sequence[Result]) -> Result:
    return next(result for result in results if result.method is FULL)


def _over(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value - base


def _nats(value: float | None, base: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if base is None else f"{value - base:+.3f}"


def _aligned(rows: list[list[Any]], *, rule_after: int) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for place, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
        if place == rule_after:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _fill(text: str) -> str:
    return textwrap.fill(text, WIDTH)
