"""Which words a method keeps and another drops: kept slots, counted over layers and KV heads, as words of the text."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

WORD = re.compile(r"\w+(?:[-.']\w+)*|[^\w\s]+")


@dataclass(frozen=True, slots=True)
class Difference:
    """One method's kept slots beside another's, which keeps as many.

    tokens: slots kept here and not there, summed over layers and KV heads; slots: all that are kept. more, fewer: the
    words with the largest net gain or loss, and in how many slots more (fewer) they are kept.
    """

    tokens: int
    slots: int
    more: list[tuple[str, int]]
    fewer: list[tuple[str, int]]


def difference(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], words: Sequence[str]) -> Difference:
    """`mine`, `theirs`: per layer the kept slots [Hkv, B]; `words`: the word of each of the n tokens, "" for none."""
    n = len(words)
    net = torch.zeros(n, dtype=torch.int64)
    tokens = kept = 0
    for ours, other in zip(mine, theirs, strict=True):
        change = _mask(ours, n).to(torch.int64) - _mask(other, n).to(torch.int64)
        net += change.sum(dim=0)
        tokens += int((change > 0).sum())
        kept += ours.numel()
    by_word: Counter[str] = Counter()
    for word, count in zip(words, net.tolist(), strict=True):
        if any(map(str.isalnum, word)):
            by_word[word] += count
    more = [(word, count) for word, count in by_word.most_common() if count > 0]
    fewer = [(word, -count) for word, count in reversed(by_word.most_common()) if count < 0]
    return Difference(tokens, kept, more, fewer)


def words_of(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The word each token is part of; "" for white space."""
    place = [""] * len(text)
    for found in WORD.finditer(text):
        place[found.start() : found.end()] = [found[0]] * len(found[0])
    return [next((place[at] for at in range(start, stop) if place[at]), "") for start, stop in spans]


def _mask(slots: Any, n: int) -> torch.Tensor:
    mask = torch.zeros(slots.shape[0], n, dtype=torch.bool)
    return mask.scatter_(1, slots.to(device="cpu", dtype=torch.int64), True)
