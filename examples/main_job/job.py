"""The job from end to end: service, model, one prefill, six caches, the same questions to each."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from graphkv_client import CompressClient
from graphkv_client.integrations.transformers import cut

from main_job import report
from main_job.decode import answer, cache_bytes, loss
from main_job.methods import FULL, LAST, METHODS, SNAPKV, Method, Result
from main_job.model import Loaded, load
from main_job.options import Options
from main_job.prefill import Chosen, Prefilled, prefill
from main_job.progress import Progress
from main_job.service import CALL_SECONDS, service
from main_job.text import QUESTIONS, Prompt, Question, Reader
from main_job.words import difference, words_of


def run(options: Options, progress: Progress) -> None:
    """Does it all and prints the table; raises DemoError where the user has to do something."""
    questions = tuple(Question(text) for text in options.questions) or QUESTIONS
    if options.question_inside:
        questions = questions[:1]
    with progress.step("model", "loading the model"):
        loaded = load(progress.note)
    reader = Reader(loaded.tokenizer, loaded.model.config.max_position_embeddings)
    prompt = reader.prompt(options.prompt_file, questions[0] if options.question_inside else None)
    asked = _Asked(loaded, reader, prompt, questions, options.question_inside)
    policies = [method.policy(options.budget) for method in METHODS if method.policy is not None]
    with torch.inference_mode(), service(options.address, progress) as address:
        with CompressClient(address, timeout=CALL_SECONDS) as client:
            filled = prefill(loaded.model, prompt.ids, client, policies, progress)
        budget = policies[0].tokens(prompt.tokens)
        kept = _kept(filled, prompt.tokens, budget)
        results = []
        for method in METHODS:
            with progress.step(method.name, f"asking: {method.name}"):
                results.append(asked.measure(method, filled.cache, *kept[method.name], filled.first))
    _compare(results, kept, prompt)
    progress.clear()
    job = report.Job(budget, options.question_inside, prompt.tokens, questions, address, progress.seconds)
    if options.json is not None:
        options.json.write_text(report.to_json(job, results), encoding="utf-8")
    print(report.table(job, results))


Kept = tuple[dict[int, torch.Tensor], Chosen | None]


def _kept(filled: Prefilled, num_tokens: int, budget: int) -> dict[str, Kept]:
    """Per method the kept slots by layer (none: everything is kept), and the service's answer where it gave one."""
    kept: dict[str, Kept] = {FULL.name: ({}, None)}
    last = torch.arange(max(0, num_tokens - budget), num_tokens)
    keys = [layer.keys for layer in filled.cache.layers]
    kept[LAST.name] = ({index: last.expand(key.shape[1], -1) for index, key in enumerate(keys)}, None)
    served = [method for method in METHODS if method.policy is not None]
    for method, chosen in zip(served, filled.chosen, strict=True):
        kept[method.name] = ({}, None) if chosen is None else (chosen.kept, chosen)
    return kept


@dataclass(slots=True)
class _Asked:
    """The same questions, and the same measures, for each method's cache; the first one measured is the full cache."""

    loaded: Loaded
    reader: Reader
    prompt: Prompt
    questions: tuple[Question, ...]
    inside: bool
    reference: list[list[int]] | None = None

    def measure(
        self, method: Method, cache: Any, kept: dict[int, torch.Tensor], chosen: Chosen | None, first: torch.Tensor
    ) -> Result:
        """Cuts a copy of `cache` down to `kept`, asks, and measures."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "cut"):
            cache = cut(cache, kept)
        result = Result(method, cache.layers[0].keys.shape[2], cache_bytes(cache), seconds=seconds)
        if chosen is not None:
            summary = chosen.selection.summary
            result.sent_bytes = summary.sent_bytes
            seconds |= {"scoring": summary.seconds.get("prescore", 0.0), "choosing": summary.seconds.get("compute", 0.0)}
            seconds["ready"] = chosen.waited_seconds + seconds["cut"]
            ratios = chosen.selection.kept_score_ratio
            result.kept_score_ratio = sum(ratios) / len(ratios)
        model = self.loaded.model
        fed = [None if self.inside else self.reader.question(question) for question in self.questions]
        with _timed(seconds, "answering"):
            answers = [answer(model, cache, ids, first) for ids in fed]
        result.answers = [self.reader.decode(ids) for ids in answers]
        result.right = [question.right(text) for question, text in zip(self.questions, result.answers, strict=True)]
        if self.reference is None:
            self.reference = answers
        nothing = self.prompt.ids[:, :0]
        with _timed(seconds, "measuring"):
            result.text_loss = loss(model, cache, nothing, self.prompt.held_out)
            losses = [
                loss(model, cache, nothing if ids is None else ids, torch.tensor([known], dtype=torch.int64))
                for ids, known in zip(fed, self.reference, strict=True)
                if known
            ]
        counted = [value for value in losses if value is not None]
        result.answer_loss = sum(counted) / len(counted) if counted else None
        return result


def _compare(results: list[Result], kept: dict[str, Kept], prompt: Prompt) -> None:
    """Says of each method that drops anything what it keeps and SnapKV does not."""
    words = words_of(prompt.text, prompt.spans)
    theirs = kept[SNAPKV.name][0]
    for result in results:
        mine = kept[result.method.name][0]
        if mine and theirs and result.method is not SNAPKV:
            layers = sorted(theirs)
            result.difference = difference([mine[layer] for layer in layers], [theirs[layer] for layer in layers], words)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
