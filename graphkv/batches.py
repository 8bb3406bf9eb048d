"""What a caller hands to `select`, taken apart: prompts, layers, tensors; whatever kind of array, layout or batch it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphkv.arrays import heads_first, like, to_torch, value_norms
from graphkv.budgets import plan_layers
from graphkv.finite import check_finite
from graphkv.layer import Layer
from graphkv.terms.errors import Reason, invalid
from graphkv.terms.needs import naming_values
from graphkv.terms.policy import Policy
from graphkv.terms.rope import Rope

__all__ = ["Prompt", "prompts_of"]

LAYOUTS = ("HND", "NHD")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt's layers, and an array of the caller's kind that answers are to look like."""

    layers: tuple[Layer, ...]
    example: Any

    def answer(self, indices: torch.Tensor | list[torch.Tensor]) -> Any:
        """The indices (or an output) in the caller's kind, on its device."""
        return [like(row, self.example) for row in indices] if isinstance(indices, list) else like(indices, self.example)


def prompts_of(
    inputs: Mapping[str, Any], *, policy: Policy, pinned: Any, rope: Rope | None, layout: str, outputs: Sequence[str] = ()
) -> tuple[list[Prompt], bool]:
    """The prompts of a call, and whether it was a batch (a list of prompts)."""
    if layout not in LAYOUTS:
        raise invalid("layout", layout, "HND or NHD", reason=Reason.BAD_SHAPE)
    if not isinstance(policy, Policy):
        raise invalid("policy", policy, "a Policy")
    if rope is not None and not isinstance(rope, Rope):
        raise invalid("rope", rope, "a Rope, or None")
    if not is_batch(inputs["keys"]):
        return [_prompt(inputs, policy, pinned or (), rope, layout, outputs)], False
    count = len(inputs["keys"])
    for name, given in (*inputs.items(), ("pinned", pinned)):
        if given is not None and (not isinstance(given, (list, tuple)) or len(given) != count):
            raise invalid(name, type(given).__name__, f"a list of {count}, one for each prompt", reason=Reason.BAD_SHAPE)
    prompts = []
    for place in range(count):
        own = {name: None if given is None else given[place] for name, given in inputs.items()}
        prompts.append(_prompt(own, policy, () if pinned is None else pinned[place] or (), rope, layout, outputs))
    return prompts, True


def is_batch(keys: Any) -> bool:
    """A list whose entries are prompts ([L, Hkv, n, d], or sequences of layers) rather than layers ([Hkv, n, d])."""
    if not isinstance(keys, (list, tuple)):
        return False
    if not keys:
        raise invalid("keys", keys, "at least one prompt or layer", reason=Reason.BAD_SHAPE)
    return isinstance(keys[0], (list, tuple)) or len(getattr(keys[0], "shape", ())) == 4


def _prompt(
    inputs: Mapping[str, Any],
    policy: Policy,
    pinned: Sequence[Any],
    rope: Rope | None,
    layout: str,
    outputs: Sequence[str],
) -> Prompt:
    if inputs["keys"] is None:
        raise invalid("keys", None, "[L, Hkv, n, d], or a sequence of L arrays [Hkv, n, d]", reason=Reason.BAD_SHAPE)
    if not isinstance(pinned, (list, tuple)):
        raise invalid("pinned", pinned, "a list of (start, stop)", reason=Reason.BAD_SHAPE)
    per_layer = {name: _layers(name, given) for name, given in inputs.items() if given is not None}
    for own in per_layer["keys"]:
        if own.ndim != 3:
            raise invalid("keys", list(own.shape), "[Hkv, n, d] in each layer", reason=Reason.BAD_SHAPE)
    keys = [heads_first(tensor, layout) for tensor in per_layer["keys"]]
    for name, tensors in per_layer.items():
        if len(tensors) != len(keys):
            raise invalid(name, f"{len(tensors)} layers", f"{len(keys)} layers, as the keys", reason=Reason.BAD_SHAPE)
        if name in ("queries", "values", "similarity_keys"):
            for own in tensors:
                if own.ndim != 3:
                    raise invalid(name, list(own.shape), "three axes in each layer", reason=Reason.BAD_SHAPE)
            per_layer[name] = [heads_first(tensor, layout) for tensor in tensors]
    per_layer["keys"] = keys
    if "values" in per_layer:
        per_layer["value_norms"] = [value_norms(own) for own in per_layer.pop("values")]
    plans = plan_layers(
        policy,
        num_tokens=keys[0].shape[1],
        num_layers=len(keys),
        pinned=pinned,
        caller_scores="scores" in per_layer,
        outputs=outputs,
    )
    with naming_values():
        layers = [Layer(plan, rope=rope, **{name: own[plan.layer] for name, own in per_layer.items()}) for plan in plans]
    for plan, norms in zip(plans, per_layer.get("value_norms", ()), strict=False):  # none, or one a layer
        if not plan.keeps_all:  # where the scorer would say it of the norms
            check_finite("values", norms[..., None], plan.layer)
    example = inputs["keys"]
    return Prompt(tuple(layers), example[0] if isinstance(example, (list, tuple)) else example)


def _layers(name: str, given: Any) -> list[torch.Tensor]:
    """One tensor a layer, views where possible."""
    if isinstance(given, (list, tuple)):
        return [to_torch(name, array) for array in given]
    tensor = to_torch(name, given)
    if tensor.ndim < 2 or tensor.shape[0] == 0:
        raise invalid(name, list(tensor.shape), "an array whose first axis is the layers", reason=Reason.BAD_SHAPE)
    return list(tensor.unbind(0))
