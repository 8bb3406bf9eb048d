"""What a caller hands to a call, taken apart and checked: prompts, layers, and every array of a layer by its role.

Arrays become views with the heads first, whatever the layout, and are not read. Knows no wire and no formula.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphkv.terms.always_kept import Range, check_pinned
from graphkv.terms.errors import Reason, invalid
from graphkv.terms.needs import check_graph_inputs, check_outputs, check_source, naming_values
from graphkv.terms.policy import Policy
from graphkv.terms.rope import Rope
from graphkv.terms.shapes import EXTRA_ROLES, IMPORTANCE_ROLES, Shapes
from graphkv_client._arrays import Answer, Array, answer_like, dtype_name, is_tensor, norms, read, recorded_event

__all__ = [
    "HEADED",
    "ROLES",
    "CallTerms",
    "LayerInputs",
    "PromptInputs",
    "arrays_of",
    "check_sources",
    "checked_pinned",
    "layer_of",
    "prompts_of",
]

ROLES = ("keys", *IMPORTANCE_ROLES, *EXTRA_ROLES, "similarity_keys", "positions")
HEADED = ("keys", "queries", "values", "similarity_keys")
"""Roles whose axes `layout` orders."""
LAYOUTS = ("HND", "NHD")


@dataclass(frozen=True, slots=True)
class CallTerms:
    """What holds for every layer of a call: how to choose, how keys were rotated, how arrays lie, what to answer besides.

    `outputs` become each once, in the catalogue's order. Raises InvalidInputError naming the argument.
    """

    policy: Policy
    rope: Rope | None = None
    layout: str = "HND"
    outputs: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise invalid("policy", self.policy, "a Policy")
        if self.rope is not None and not isinstance(self.rope, Rope):
            raise invalid("rope", self.rope, "a Rope, or None")
        if self.layout not in LAYOUTS:
            raise invalid("layout", self.layout, "HND or NHD", reason=Reason.BAD_SHAPE)
        object.__setattr__(self, "outputs", check_outputs(self.policy, self.outputs))


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """One layer of one prompt: `arrays` by role, numpy or torch, heads first, of the caller's memory; checked.

    `shapes` are one layer's; `answer` turns a numpy array into the caller's kind on its device. `ready`: the CUDA event
    after which the arrays may be read, None where they are not on such a device.
    """

    arrays: Mapping[str, Any]
    shapes: Shapes
    answer: Answer
    ready: Any = None

    @property
    def source(self) -> str | None:
        """Which of queries, attention and scores importance comes from; None where the scorer reads the keys alone."""
        return next((role for role in IMPORTANCE_ROLES if role in self.arrays), None)

    @property
    def on_torch(self) -> bool:
        """Whether the keys are a torch tensor, so that scoring can run where they are."""
        return is_tensor(self.arrays["keys"])


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """One prompt: its layers and its pinned ranges."""

    layers: tuple[LayerInputs, ...]
    pinned: tuple[Range, ...]

    @property
    def tokens(self) -> int:
        """n."""
        return self.layers[0].shapes.tokens


def prompts_of(given: Mapping[str, Any], *, terms: CallTerms, pinned: Any) -> tuple[list[PromptInputs], bool]:
    """The prompts of a call, and whether it was a batch (a list of prompts).

    `given`: every argument by its role, None where left out. Raises InvalidInputError naming the argument.
    """
    batched = _is_batch(given["keys"])
    if not batched:
        prompts = [_prompt(given, terms, pinned)]
    else:
        count = len(given["keys"])
        for name, value in (*given.items(), ("pinned", pinned)):
            if value is not None and (not isinstance(value, list | tuple) or len(value) != count):
                raise invalid(name, type(value).__name__, f"a list of {count}, one for each prompt", reason=Reason.BAD_SHAPE)
        prompts = [
            _prompt(
                {name: None if value is None else value[place] for name, value in given.items()},
                terms,
                None if pinned is None else pinned[place],
            )
            for place in range(count)
        ]
    _check_alike([layer for prompt in prompts for layer in prompt.layers], [len(prompt.layers) for prompt in prompts])
    return prompts, batched


def arrays_of(given: Mapping[str, Array | None], terms: CallTerms) -> dict[str, Any]:
    """One layer's arrays by role, as numpy or torch, heads first; those left out are missing. Values become their norms."""
    arrays = {}
    for role, array in given.items():
        if array is not None:
            view = read(role, array)
            if terms.layout == "NHD" and role in HEADED:
                if view.ndim != 3:
                    raise invalid(role, list(view.shape), "three axes", reason=Reason.BAD_SHAPE)
                view = view.swapaxes(0, 1)
            if role == "positions":
                view = _integers(view)
            dtype_name(role, view)
            if role == "values":  # read here and now: what travels, and what a stream holds, is their norms
                arrays["value_norms"] = norms(role, view)
            else:
                arrays[role] = view
    return arrays


def layer_of(arrays: Mapping[str, Any], answer: Answer, terms: CallTerms) -> LayerInputs:
    """One whole layer, its shapes and sources checked against each other and the policy."""
    dims = {role: tuple(array.shape) for role, array in arrays.items()}
    with naming_values():
        shapes = Shapes.of_layer(dims)
    check_sources(terms.policy, dims, shapes)
    check_graph_inputs(terms.policy, similarity_keys="similarity_keys" in dims, rope=terms.rope, head_dim=shapes.head_dim)
    return LayerInputs(arrays, shapes, answer, recorded_event(arrays["keys"]))


def check_sources(policy: Policy, given: Mapping[str, Any], shapes: Shapes) -> None:
    """Raises InvalidInputError unless a layer that has the roles `given` brings what its policy's scorer needs."""
    sources = [role for role in IMPORTANCE_ROLES if role in given]
    extras = [role for role in EXTRA_ROLES if role in given]
    check_source(policy, sources, rows=shapes.window, num_tokens=shapes.tokens, extras=extras)


def checked_pinned(pinned: Any, tokens: int) -> tuple[Range, ...]:
    """One prompt's pinned ranges, None for none; InvalidInputError where one is not inside the prompt."""
    if pinned is None:
        return ()
    if not isinstance(pinned, list | tuple):
        raise invalid("pinned", pinned, "a list of (start, stop)", reason=Reason.BAD_SHAPE)
    return check_pinned(pinned, tokens)


def _is_batch(keys: Any) -> bool:
    """A list whose entries are prompts ([L, Hkv, n, d], or sequences of layers) rather than layers ([Hkv, n, d])."""
    if not isinstance(keys, list | tuple):
        return False
    if not keys:
        raise invalid("keys", keys, "at least one prompt or layer", reason=Reason.BAD_SHAPE)
    return isinstance(keys[0], list | tuple) or len(getattr(keys[0], "shape", ())) == 4


def _prompt(given: Mapping[str, Any], terms: CallTerms, pinned: Any) -> PromptInputs:
    if given["keys"] is None:
        raise invalid("keys", None, "given", reason=Reason.BAD_SHAPE)
    per_layer = {name: _layers(name, value) for name, value in given.items() if value is not None}
    count = len(per_layer["keys"])
    for name, arrays in per_layer.items():
        if len(arrays) != count:
            raise invalid(name, f"{len(arrays)} layers", f"{count} layers, as the keys", reason=Reason.BAD_SHAPE)
    example = given["keys"]
    layers = []
    for place in range(count):
        own = {name: arrays[place] for name, arrays in per_layer.items()}
        views = arrays_of(own, terms)
        answer = answer_like(example[place] if isinstance(example, list | tuple) else example)
        layers.append(layer_of(views, answer, terms))
    tokens = layers[0].shapes.tokens
    for layer in layers:
        if layer.shapes.tokens != tokens:
            allowed = f"{tokens}, as in the prompt's first layer"
            raise invalid("keys", f"n {layer.shapes.tokens}", allowed, reason=Reason.BAD_SHAPE)
    return PromptInputs(tuple(layers), checked_pinned(pinned, tokens))


def _layers(name: str, given: Any) -> Sequence[Array]:
    """One array a layer, views where one array holds them all."""
    if isinstance(given, list | tuple):
        if not given:
            raise invalid(name, given, "at least one layer", reason=Reason.BAD_SHAPE)
        return given
    array = read(name, given)
    if array.ndim < 2 or array.shape[0] == 0:
        raise invalid(name, list(array.shape), "an array whose first axis is the layers", reason=Reason.BAD_SHAPE)
    return [array[layer] for layer in range(array.shape[0])]


def _integers(array: Any) -> Any:
    """Integers of any other width as int64; what is no integer stays, for the dtype check to name."""
    name = str(array.dtype).removeprefix("torch.")
    if name in ("int32", "int64") or not name.startswith(("int", "uint")):
        return array
    return array.long() if is_tensor(array) else array.astype("int64")


def _check_alike(layers: Sequence[LayerInputs], counts: Sequence[int]) -> None:
    """One call has one number of layers and one model's sizes; only prompts' lengths differ."""
    if len(set(counts)) > 1:
        raise invalid("keys", f"{counts} layers", "as many layers in every prompt", reason=Reason.BAD_SHAPE)
    first = layers[0].shapes
    for layer in layers:
        shapes = layer.shapes
        if (shapes.kv_heads, shapes.head_dim) != (first.kv_heads, first.head_dim):
            raise invalid("keys", shapes.describe(), f"alike in all layers: {first.describe()}", reason=Reason.BAD_SHAPE)
        if shapes.query_heads != first.query_heads:
            source = layer.source or "queries"
            allowed = f"alike in all layers: Hq {first.query_heads}"
            raise invalid(source, f"Hq {shapes.query_heads}", allowed, reason=Reason.BAD_SHAPE)
