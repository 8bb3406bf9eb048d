"""What a call answers that the service did not: the same choice made in this process, or every token.

A door: `graphkv.algorithm` and torch are imported when a choice is made here, never before. Knows no message and no socket.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphkv.terms.always_kept import Range
from graphkv.terms.errors import DeadlineError, InvalidInputError, OverloadedError, UnavailableError
from graphkv.terms.needs import naming_values
from graphkv.terms.selection import LayerSelection
from graphkv_client._arrays import Answer, Raw, as_torch_reads, is_tensor, torch_module, wait_for
from graphkv_client._inputs import CallTerms, PromptInputs

__all__ = ["WHERE", "Unanswered", "Waiting", "check_possible", "covers", "instead", "unanswered"]

WHERE = {"local": "local", "keep_all": "kept_all"}
"""What `Summary.where` says, by what was chosen."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A layer without an answer, and the kind that is wanted in. `arrays`: by role, whole; only to choose here.

    `ready`: the CUDA event after which they may be read, if any.
    """

    arrays: Mapping[str, Any]
    answer: Answer
    ready: Any = None


@dataclass(frozen=True, slots=True)
class Unanswered:
    """One prompt of `tokens`, with `layers` in all, and those of its layers that have no answer."""

    prompt: int
    tokens: int
    pinned: tuple[Range, ...]
    layers: int
    kv_heads: int
    caller_scores: bool
    waiting: Mapping[int, Waiting]


def check_possible(on_unavailable: str) -> None:
    """Raises InvalidInputError where a choice shall be made here and cannot be."""
    if on_unavailable == "local" and importlib.util.find_spec("torch") is None:
        message = "on_unavailable: choosing here needs torch, which is not installed: pip install 'graphkv[torch]'"
        raise InvalidInputError(message, argument="on_unavailable")


def covers(error: BaseException) -> bool:
    """Whether it says that the service did not answer, and not that the call is wrong."""
    return isinstance(error, UnavailableError | OverloadedError | DeadlineError)


def unanswered(inputs: Sequence[PromptInputs]) -> list[Unanswered]:
    """All that was handed to `select()`."""
    return [
        Unanswered(
            prompt,
            one.tokens,
            one.pinned,
            len(one.layers),
            one.layers[0].shapes.kv_heads,
            "scores" in one.layers[0].arrays,
            {layer: Waiting(own.arrays, own.answer, own.ready) for layer, own in enumerate(one.layers)},
        )
        for prompt, one in enumerate(inputs)
    ]


def instead(choice: str, terms: CallTerms, prompts: Sequence[Unanswered]) -> list[LayerSelection]:
    """The answers of all layers that wait, in order. Raises InvalidInputError where an input is wrong."""
    choose = _chosen_here if choice == "local" else _kept_all
    return [layer for prompt in prompts for layer in choose(terms, prompt)]


def _kept_all(terms: CallTerms, prompt: Unanswered) -> list[LayerSelection]:
    policy = terms.policy
    found = []
    for layer, waiting in sorted(prompt.waiting.items()):
        if policy.granularity == "model" and layer:
            continue  # one answer for all, which has layer 0
        heads = () if policy.granularity != "head" else (prompt.kv_heads,)
        slots = prompt.tokens if policy.page_size is None else -(-prompt.tokens // policy.page_size)
        indices = np.broadcast_to(np.arange(slots, dtype=np.int32), (*heads, slots)).copy()  # the caller's own
        outputs = _all_kept_outputs(heads, prompt.tokens)
        found.append(
            LayerSelection(
                layer=layer,
                indices=waiting.answer(indices),
                num_tokens=prompt.tokens,
                kept_score_ratio=1.0,
                changed=0,
                importance="scores" if prompt.caller_scores else policy.scorer,
                fingerprint=policy.fingerprint,
                prompt=prompt.prompt,
                granularity=policy.granularity,
                page_size=policy.page_size,
                outputs={name: waiting.answer(outputs[name]) for name in terms.outputs},
            )
        )
    return found


def _all_kept_outputs(heads: tuple[int, ...], tokens: int) -> dict[str, Raw]:
    """Each output as it is where no token competes."""
    return {
        "updated_scores": np.full((*heads, tokens), np.inf, np.float32),
        "keep_mask": np.ones((*heads, tokens), np.bool_),
        "decay_factors": np.ones((*heads, tokens), np.float32),
        "choice_order": np.zeros((*heads, 0), np.int32),
        "dropped_ranges": np.zeros((0, 3), np.int32),
        "moves": np.zeros((0, 3), np.int32),
    }


def _chosen_here(terms: CallTerms, prompt: Unanswered) -> list[LayerSelection]:
    torch = torch_module("keys", "choosing here")
    from graphkv import algorithm, arrays, budgets, layer

    def tensors(waiting: Waiting) -> dict[str, Any]:
        wait_for(waiting.ready, waiting.arrays["keys"])
        own = {
            role: array if is_tensor(array) else arrays.to_torch(role, as_torch_reads(array))
            for role, array in waiting.arrays.items()
        }
        return {role: tensor.to(own["keys"].device) for role, tensor in own.items()}

    places = sorted(prompt.waiting)
    with torch.inference_mode(), naming_values():
        plans = budgets.plan_layers(
            terms.policy,
            num_tokens=prompt.tokens,
            num_layers=prompt.layers,
            pinned=prompt.pinned,
            caller_scores=prompt.caller_scores,
            outputs=terms.outputs,
        )
        given = [layer.Layer(plans[place], rope=terms.rope, **tensors(prompt.waiting[place])) for place in places]
        found = []
        for place, answer in zip(places, algorithm.select_prompt(given), strict=False):  # one for all, where they share it
            if isinstance(answer, InvalidInputError):
                raise answer
            kind = _from_tensor(prompt.waiting[place].answer)
            found.append(algorithm.selection_of(answer, plans[place], prompt.prompt, kind))
    return found


def _from_tensor(answer: Answer) -> Callable[[Any], Any]:
    return lambda tensor: answer(tensor.cpu().numpy())
