"""Scores torch tensors where they are, and copies to the host only what the service needs: the candidates.

A door: `graphkv.algorithm` and torch are imported when a tensor came, never before. What it gives does not grow with the
prompt (but for policies without candidates, which compare all keys). Knows no message and no socket.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from graphkv_proto.tensors import item_size

from graphkv.terms.always_kept import Range
from graphkv.terms.needs import naming_values
from graphkv_client._arrays import as_torch_reads, is_tensor, torch_module
from graphkv_client._inputs import CallTerms
from graphkv_client._pieces import Form, Piece, piece_of

__all__ = ["Prescore"]


class Prescore:
    """The narrowed form of each layer. `prompts`: n and the pinned ranges of each; `layers`: L.

    Raises InvalidInputError where torch is missing or a prompt's pinned tokens are more than a layer's budget.
    """

    computes = True

    def __init__(
        self,
        terms: CallTerms,
        prompts: Sequence[tuple[int, tuple[Range, ...]]],
        layers: int,
        *,
        caller_scores: bool,
    ) -> None:
        self._torch = torch_module("keys", "scoring where they are")
        from graphkv import algorithm, arrays, budgets, layer

        self._algorithm = algorithm
        self._to_torch = arrays.to_torch
        self._layer = layer.Layer
        self._rope = terms.rope
        self._plans = [
            budgets.plan_layers(terms.policy, num_tokens=tokens, num_layers=layers, pinned=pinned, caller_scores=caller_scores)
            for tokens, pinned in prompts
        ]
        self.seconds: dict[str, float] = {"prescore": 0.0}

    def layer_bytes(self, form: Form, prompt: int, layer: int) -> int:
        """The bytes of this layer's candidates; of all keys and scores where the policy has no candidates."""
        plan = self._plans[prompt][layer]
        heads, tokens = form.shapes.kv_heads, plan.num_tokens
        if plan.candidates is None:
            ahead = self.ahead(form.dtypes, prompt, layer)
            return sum(form.whole_bytes(role, tokens) for role in ahead) + heads * tokens * item_size("f32")
        width = plan.candidate_width
        row = width * (item_size("i32") + item_size("f32")) + 3 * item_size("f64")
        if plan.needs_keys and "similarity_keys" in form.dtypes:
            row += width * form.extra * item_size(form.dtypes["similarity_keys"])
        elif plan.needs_keys:
            row += width * form.shapes.head_dim * item_size(form.dtypes["keys"])
        row += width * item_size("i64") if "positions" in form.dtypes else 0
        return heads * row

    def ahead(self, given: Collection[str], prompt: int, layer: int) -> tuple[str, ...]:
        """Nothing where candidates are chosen, which takes the whole layer; else what the graph compares."""
        if self._plans[prompt][layer].candidates is not None:
            return ()
        if "similarity_keys" in given:  # they stand in for the keys, and are unrotated already
            return ("similarity_keys",)
        return tuple(role for role in ("keys", "positions") if role in given)

    def pieces(self, arrays: Mapping[str, Any], prompt: int, layer: int) -> list[Piece]:
        """The layer's candidates, or its scores where all keys are compared (never attention: it is twice the keys).

        Raises InvalidInputError where a number that is read is not finite.
        """
        started = time.perf_counter()
        plan = self._plans[prompt][layer]
        with self._torch.inference_mode(), naming_values():
            device = arrays["keys"].device
            tensors = {
                role: (array if is_tensor(array) else self._to_torch(role, as_torch_reads(array))).to(device)
                for role, array in arrays.items()
            }
            given = self._layer(plan, rope=self._rope, **tensors)
            if plan.candidates is None:
                pieces = [piece_of("scores", self._algorithm.score_layer(given))]
            else:
                pieces = _narrowed(self._algorithm.narrow(given))
        self.seconds["prescore"] += time.perf_counter() - started
        return pieces


def _narrowed(found: Any) -> list[Piece]:
    """The candidates' tensors; none that is empty (where nothing competes, the facts alone say so)."""
    tensors = {
        "candidate_ids": found.ids,
        "scores": found.scores,
        "row_facts": found.facts,
        "keys": found.keys,
        "similarity_keys": found.similarity_keys,
        "positions": found.positions,
    }
    return [piece_of(role, tensor, ranged=False) for role, tensor in tensors.items() if tensor is not None and tensor.numel()]
