"""What the model is asked: documents to go on with, and facts to find again, as token ids that depend on the seed alone.

A case is prefilled with `ids`, cut, and fed with `fed`; only what the cut cache predicts is judged. So the last token of a
question inside the window is fed after the cut: otherwise the uncut prefill would give the first token of the answer.
Knows tokens, not models.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quality_rooms.texts import KINDS

__all__ = ["GROUPS", "TASKS", "Case", "Reader", "Task"]

GROUPS = ("in the window", "afterwards", "documents")
PEOPLE = (
    "Adam Alice Anna Arthur Barbara Brian Carol Charles Clara Daniel David Diana Edward Emma Eric Frank George Grace Harold "
    "Helen Henry Ivan Jack James Jane Julia Karen Kevin Laura Linda Lucy Mark Martin Mary Michael Nancy Oliver Oscar Paul Peter "
    "Rachel Robert Rose Sarah Simon Susan Thomas Victor Walter William"
)
SURNAMES = (
    "Allen Anderson Bailey Baker Bell Bennett Brooks Brown Campbell Carter Clark Collins Cook Cooper Davis Edwards Evans Fisher "
    "Foster Graham Gray Green Hall Harris Hill Howard Hughes Jackson Johnson Kelly King Lewis Miller Mitchell Morgan Morris Murphy "
    "Nelson Parker Phillips Price Reed Roberts Robinson Rogers Ross Russell Scott Smith Stewart Taylor Turner Walker Ward Watson "
    "White Williams Wilson Wood Wright Young"
)
FACTS = 8
ASKED_AT_ONCE = 4
PASSAGE = 96  # tokens of the passage that is repeated


@dataclass(frozen=True, slots=True)
class Task:
    """group: where its mean is reported. exact: judged by exact match, otherwise by the loss of the continuation."""

    name: str
    group: str
    build: Callable[["Reader", random.Random, int], "Case"]
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt of one task. ids: prefilled. fed: fed after the cut. spans: the parts (start >= 1, stop) of `fed` that are
    judged, each predicted from what stands before it.
    """

    task: str
    prompt: int
    ids: tuple[int, ...]
    fed: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class Reader:
    """One model's tokens of the texts, cut into pieces that do not overlap, in an order that the seed gives."""

    def __init__(self, tokenizer: Any, *, num_tokens: int, continuation: int, seed: int) -> None:
        self.num_tokens = num_tokens
        self.continuation = continuation
        self._tokenizer = tokenizer
        self.begin = list(tokenizer("").input_ids)  # the model's own mark at the beginning, if it has one
        self._pieces: dict[str, list[list[int]]] = {}
        for kind, text in KINDS.items():
            ids = self.tokens(text())
            width = num_tokens + continuation
            pieces = [ids[start : start + width] for start in range(0, len(ids) - width + 1, width)]
            random.Random(f"{seed} {kind}").shuffle(pieces)
            self._pieces[kind] = pieces
        self._seed = seed

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, without marks."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def piece(self, kind: str, prompt: int) -> list[int]:
        """num_tokens + continuation ids; from the beginning again once the text is used up."""
        return self._pieces[kind][prompt % len(self._pieces[kind])]

    def pieces(self, kind: str) -> int:
        """How many there are before they come again."""
        return len(self._pieces[kind])

    def cases(self, task: str, prompts: int) -> list[Case]:
        """The first `prompts` prompts of a task."""
        made = []
        for prompt in range(prompts):
            case = TASKS[task].build(self, random.Random(f"{self._seed} {task} {prompt}"), prompt)
            made.append(Case(task, prompt, (*self.begin, *case.ids), case.fed, case.spans))
        return made


def document(kind: str) -> Task:
    """A text of one kind, and how it goes on."""

    def build(reader: Reader, chance: random.Random, prompt: int) -> Case:
        piece = reader.piece(kind, prompt)
        cut = reader.num_tokens - len(reader.begin)
        fed = piece[cut : cut + reader.continuation]
        return Case(kind, prompt, tuple(piece[:cut]), tuple(fed), ((1, len(fed)),))

    return Task(kind, "documents", build, exact=False)


def facts(name: str, group: str, *, asked: int, repeated: bool = False) -> Task:
    """Eight people's names in a text, or in a passage repeated many times; the surnames of `asked` of them are asked for."""

    def build(reader: Reader, chance: random.Random, prompt: int) -> Case:
        people, surnames = chance.sample(PEOPLE.split(), FACTS), chance.sample(SURNAMES.split(), FACTS)
        told = dict(zip(people, surnames, strict=True))
        notes = [reader.tokens(f"\n\nNote: {person} {surname} was here.\n\n") for person, surname in told.items()]
        question, answer, spans = _asked(reader, {person: told[person] for person in chance.sample(people, asked)})
        room = reader.num_tokens - sum(map(len, notes)) - len(question) - len(reader.begin)
        piece = reader.piece(chance.choice(list(KINDS)), chance.randrange(10**6))
        if repeated:
            piece = (piece[:PASSAGE] * (room // PASSAGE + 1))[:room]
        context = _scattered(piece[:room], notes, chance)
        if group == "in the window":  # its last token is fed after the cut
            context, question = context + question[:-1], question[-1:]
        before = len(question)
        judged = tuple((start + before, stop + before) for start, stop in spans)
        return Case(name, prompt, tuple(context), tuple(question + answer), judged)

    return Task(name, group, build)


def _asked(reader: Reader, told: Mapping[str, str]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """The question up to where the first answer begins; the answers; where in them the surnames are."""
    people = list(told)
    if len(people) == 1:
        text = f"\n\nQuestion: What is the full name of {people[0]}?\nAnswer: {people[0]}"
    else:
        listed = f"{', '.join(people[:-1])} and {people[-1]}"
        text = f"\n\nQuestion: What are the full names of {listed}?\nAnswer: {people[0]}"
    answer: list[int] = []
    spans = []
    for person in people:
        if answer:
            answer += reader.tokens(f", {person}")
        surname = reader.tokens(f" {told[person]}")
        spans.append((len(answer), len(answer) + len(surname)))
        answer += surname
    return reader.tokens(text), answer, spans


def _scattered(piece: Sequence[int], notes: Sequence[list[int]], chance: random.Random) -> list[int]:
    """The notes at random places of the piece."""
    places = sorted(chance.randrange(len(piece)) for _ in notes)
    parts: list[int] = []
    before = 0
    for place, note in zip(places, notes, strict=True):
        parts += [*piece[before:place], *note]
        before = place
    return parts + list(piece[before:])


def _table() -> dict[str, Task]:
    tasks = []
    for group, mark in (("in the window", "seen"), ("afterwards", "unseen")):
        tasks += [
            facts(f"one of eight facts, {mark}", group, asked=1),
            facts(f"facts in a repeated passage, {mark}", group, asked=1, repeated=True),
            facts(f"four facts at once, {mark}", group, asked=ASKED_AT_ONCE),
        ]
    tasks += [document(kind) for kind in KINDS]
    return {task.name: task for task in tasks}


TASKS: Mapping[str, Task] = MappingProxyType(_table())
