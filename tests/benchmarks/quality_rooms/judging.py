"""One case under every method: how right the answer is, what it costs in nats, and how far from the full cache.

Exact match by teacher forcing: an answer is right if each of its tokens is the model's first choice after the right ones
before it, which is exactly when greedy decoding would write the answer. With several answers asked for, the share of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphkv import Rope
from quality_rooms.choosing import Chooser
from quality_rooms.methods import Method
from quality_rooms.prefill import Prefiller
from quality_rooms.tasks import Case

__all__ = ["FULL", "MEASURES", "Record", "judge"]

FULL = "full"
MEASURES = ("match", "nll", "kl")


@dataclass(frozen=True, slots=True)
class Record:
    """match: share of the spans that are right. nll: nats a token of the true text. kl: of the full cache's prediction to
    this one's, nats a token. budget 0: the full cache.
    """

    task: str
    prompt: int
    budget: int
    method: str
    match: float
    nll: float
    kl: float


def judge(
    prefiller: Prefiller,
    case: Case,
    *,
    rope: Rope,
    methods: Sequence[Method],
    budgets: Sequence[int],
    device: str,
    seed: int,
) -> list[Record]:
    """One prefill, then every method at every budget; `device` is where the choosing is done."""
    prefilled = prefiller.prefill(case.ids)
    chooser = Chooser(prefilled, rope, device=device, seed=f"{seed} {case.task} {case.prompt}")
    everything = [torch.arange(prefilled.num_tokens).expand(keys.shape[0], -1) for keys in prefilled.keys]
    whole = next(prefiller.feed(prefilled, [everything], case.fed))
    records = [_record(case, 0, FULL, whole, whole)]
    chosen = [(budget, *found) for budget in budgets for found in chooser.choose(methods, budget).items()]
    answers = prefiller.feed(prefilled, [kept for *_, kept in chosen], case.fed)
    for (budget, name, _), logits in zip(chosen, answers, strict=True):
        records.append(_record(case, budget, name, logits, whole))
    return records


def _record(case: Case, budget: int, method: str, logits: torch.Tensor, whole: torch.Tensor) -> Record:
    fed = torch.tensor(case.fed, device=logits.device)
    right, places = [], []
    for start, stop in case.spans:
        right.append(bool((logits[start - 1 : stop - 1].argmax(dim=-1) == fed[start:stop]).all()))
        places += range(start, stop)
    judged = torch.tensor(places, device=logits.device)
    seen, full = (some[judged - 1].float().log_softmax(dim=-1) for some in (logits, whole))
    nll = -seen.gather(1, fed[judged][:, None]).mean()
    kl = (full.exp() * (full - seen)).sum(dim=-1).mean()
    return Record(case.task, case.prompt, budget, method, sum(right) / len(right), float(nll), float(kl))
