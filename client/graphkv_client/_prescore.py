"""Scores torch tensors where they are, and copies to the host only what the service needs: the candidates.

A door: `graphkv.algorithm` and torch are imported when a tensor came, never before. What it gives does not grow with the
prompt, but for policies without candidates, which compare all keys, and by the scores where the answer depends on all of
them. Knows no message and no socket.
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
            budgets.plan_layers(
                terms.policy,
                num_tokens=tokens,
                num_layers=layers,
                pinned=pinned,
                caller_scores=caller_scores,
                outputs=terms.outputs,
            )
            for tokens, pinned in prompts
        ]
        self.seconds: dict[str, float] = {"prescore": 0.0}

    def layer_bytes(self, form: Form, prompt: int, layer: int) -> int:
        """The bytes of this layer's candidates and of all its scores, as far as they are needed; and of all keys where the
        graph compares all.
        """
        plan = self._plans[prompt][layer]
        heads, tokens = form.shapes.kv_heads, plan.num_tokens
        if plan.candidates is None:
            ahead = self.ahead(form.dtypes, prompt, layer)
            return sum(form.whole_bytes(role, tokens) for role in ahead) + heads * tokens * item_size("f32")
        width = plan.candidate_width
        row = width * item_size("i32")
        row += tokens * item_size("f32") if plan.needs_all_scores else width * item_size("f32") + 3 * item_size("f64")
        similar = plan.needs_keys and "similarity_keys" in form.dtypes
        if similar:
            row += width * form.extra * item_size(form.dtypes["similarity_keys"])
        elif plan.needs_keys:
            row += width * form.shapes.head_dim * item_size(form.dtypes["keys"])
        row += width * item_size("i64") if "positions" in form.dtypes and not similar else 0
        return heads * row

    def ahead(self, given: Collection[str], prompt: int, layer: int) -> tuple[str, ...]:
        """Nothing where candidates are chosen, which takes the whole layer; else what the graph compares, if it does."""
        plan = self._plans[prompt][layer]
        if plan.candidates is not None:
            return ()
        if "similarity_keys" in given:  # unrotated already; without them the policy would need a rope, read or not
            return ("similarity_keys",) if plan.policy.needs_rope else ()
        return tuple(role for role in ("keys", "positions") if role in given) if plan.needs_keys else ()

    def pieces(self, arrays: Mapping[str, Any], prompt: int, layer: int) -> list[Piece]:
        """The layer's candidates, or its scores where there are none to choose (never attention: it is twice the keys).

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
    """The candidates' tensors; none that is empty (where nothing competes, the facts alone say so).

    Where the answer depends on all scores, they are those of all tokens, and the facts follow from them.
    """
    every = found.all_scores
    tensors = {
        "candidate_ids": found.ids,  # first: they tell the form
        "scores": found.scores if every is None else every,
        "row_facts": found.facts if every is None else None,
        "keys": found.keys,
        "similarity_keys": found.similarity_keys,
        "positions": found.positions,
    }
    given = {role: tensor for role, tensor in tensors.items() if tensor is not None and tensor.numel()}
    return [piece_of(role, tensor, ranged=tensor is every) for role, tensor in given.items()]
