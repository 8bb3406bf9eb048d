"""What the engine takes: a layer in one of the forms it may arrive in."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphkv.algorithm import of_all_scores
from graphkv.budgets import LayerPlan
from graphkv.candidates import Candidates
from graphkv.layer import Layer
from graphkv.terms.errors import InvalidInputError
from graphkv.terms.rope import Rope

__all__ = ["Scored", "Work", "ready"]


@dataclass(frozen=True, slots=True)
class Scored:
    """A narrowed layer that came with the scores of all tokens, float32 [Hkv, n]; see Candidates for the rest.

    Its candidates are made where and when they are needed: they take room of their own.
    """

    plan: LayerPlan
    all_scores: torch.Tensor
    ids: torch.Tensor
    keys: torch.Tensor | None = None
    similarity_keys: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    rope: Rope | None = None

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.ids.shape[0]

    def candidates(self) -> Candidates:
        """What the algorithm sees. Raises InvalidInputError where a score is not finite or an id is no token."""
        return of_all_scores(
            self.plan,
            self.all_scores,
            ids=self.ids,
            keys=self.keys,
            similarity_keys=self.similarity_keys,
            positions=self.positions,
            rope=self.rope,
        )


Work = Layer | Candidates | Scored


def ready(works: Sequence[Work]) -> list[Layer | Candidates | InvalidInputError]:
    """Each as the algorithm takes it, or what is wrong with it."""
    found: list[Layer | Candidates | InvalidInputError] = []
    for work in works:
        try:
            found.append(work.candidates() if isinstance(work, Scored) else work)
        except InvalidInputError as error:
            found.append(error)
    return found
