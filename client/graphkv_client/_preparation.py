"""How layers become what is sent: as they were given (numpy), or scored and narrowed where they are (torch).

`Whole` is the way of a caller without torch, and here; `_prescore.Prescore` is the other, imported when a tensor came.
Where a layer's budget depends on all layers ("cake") nothing can be narrowed: then tensors go whole too.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from graphkv.terms.always_kept import Range
from graphkv.terms.catalogue import SCORERS
from graphkv_client._inputs import CallTerms
from graphkv_client._pieces import Form, Piece, Preparation

__all__ = ["Whole", "preparation_for"]


class Whole:
    """Every array as it was given; the server does the rest. `tokens`: n of each prompt."""

    computes = False

    def __init__(self, terms: CallTerms, tokens: Sequence[int]) -> None:
        self.seconds: dict[str, float] = {}
        self._terms = terms
        self._tokens = tokens

    def layer_bytes(self, form: Form, prompt: int, layer: int) -> int:
        """The sum of the roles' bytes."""
        return sum(form.whole_bytes(role, self._tokens[prompt]) for role in self.ahead(form.dtypes, prompt, layer))

    def ahead(self, given: Collection[str], prompt: int, layer: int) -> tuple[str, ...]:
        """All roles, but not the keys where neither the attention, the scorer nor the graph reads them."""
        policy = self._terms.policy
        scorer, graph = SCORERS[policy.scorer], policy.graph
        compared = graph is not None and graph.propagates and "similarity_keys" not in given
        attended = "attention" in given and scorer.reads_attention
        scored = scorer.reads_keys and not attended and "scores" not in given
        return tuple(role for role in given if role != "keys" or compared or scored or "queries" in given)

    def pieces(self, arrays: Mapping[str, Any], prompt: int, layer: int) -> list[Piece]:
        """Nothing."""
        return []


def preparation_for(
    terms: CallTerms,
    prompts: Sequence[tuple[int, tuple[Range, ...]]],
    layers: int,
    *,
    on_torch: bool,
    caller_scores: bool,
) -> Preparation:
    """The way for prompts of these (n, pinned ranges): `on_torch` says that their keys are torch tensors."""
    if not on_torch or terms.policy.budget_allocation == "cake":
        return Whole(terms, [tokens for tokens, _ in prompts])
    from graphkv_client._prescore import Prescore

    return Prescore(terms, prompts, layers, caller_scores=caller_scores)
