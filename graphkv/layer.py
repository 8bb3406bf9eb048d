"""Layer: one layer of one prompt as the algorithm sees it, its keys and where importance comes from, checked."""

from dataclasses import dataclass

import torch

from graphkv.arrays import floating
from graphkv.budgets import LayerPlan
from graphkv.terms.catalogue import SCORERS
from graphkv.terms.errors import InvalidInputError, Reason, invalid
from graphkv.terms.rope import Rope
from graphkv.terms.shapes import IMPORTANCE_ROLES, Shapes

__all__ = ["Layer", "check_graph_inputs", "check_source"]


@dataclass(frozen=True, slots=True)
class Layer:
    """All tokens of one layer, on one device.

    keys [Hkv, n, d], queries [Hq, w, d], attention [Hq, w, n], scores [Hkv, n], similarity_keys [Hkv, n, x]: any float
    dtype, any strides; positions [n] or [Hkv, n], integers. `scores` with a plan whose `caller_scores` is False were
    computed by the policy's own scorer. Raises InvalidInputError naming the argument.
    """

    plan: LayerPlan
    keys: torch.Tensor
    queries: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    similarity_keys: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    rope: Rope | None = None

    def __post_init__(self) -> None:
        roles = ("keys", *IMPORTANCE_ROLES, "similarity_keys", "positions")
        given = {role: tensor for role in roles if (tensor := getattr(self, role)) is not None}
        shapes = Shapes.of_layer({role: tuple(tensor.shape) for role, tensor in given.items()})
        if shapes.tokens != self.plan.num_tokens:
            raise invalid("keys", shapes.tokens, f"{self.plan.num_tokens} tokens, as planned", reason=Reason.BAD_SHAPE)
        for role, tensor in given.items():
            if role == "positions":
                if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                    raise invalid(role, str(tensor.dtype), "an integer dtype", reason=Reason.BAD_SHAPE)
            else:
                floating(role, tensor)
        check_source(self.plan, [role for role in IMPORTANCE_ROLES if role in given], shapes.window)
        check_graph_inputs(
            self.plan,
            similarity_keys=self.similarity_keys is not None,
            rope=self.rope,
            head_dim=shapes.head_dim,
        )

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.keys.shape[0]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        source = self.queries if self.queries is not None else self.attention
        return 0 if source is None else source.shape[0] // self.kv_heads


def check_source(plan: LayerPlan, sources: list[str], window: int) -> None:
    """At most one source of importance, the one the scorer can use, with as many query rows as the window."""
    policy = plan.policy
    if len(sources) > 1:
        raise invalid(sources[1], "given", f"left out where {sources[0]}= is given", reason=Reason.BAD_SHAPE)
    source = sources[0] if sources else None
    if source == "scores":
        return
    terms = SCORERS[policy.scorer]
    if not terms.reads_attention:
        if policy.scorer == "given":
            raise invalid("scores", None, 'given: the scorer is "given"', reason=Reason.BAD_SHAPE)
        if source is not None:
            raise invalid(source, "given", f"left out: the scorer {policy.scorer!r} does not read it", reason=Reason.BAD_SHAPE)
    elif source is None:
        allowed = f"given (or attention=, or scores=): the scorer {policy.scorer!r} needs it"
        raise invalid("queries", None, allowed, reason=Reason.BAD_SHAPE)
    elif window != plan.window:
        allowed = f"{plan.window} rows, the policy's observation window"
        raise invalid(source, f"{window} rows", allowed, reason=Reason.BAD_SHAPE)


def check_graph_inputs(plan: LayerPlan, *, similarity_keys: bool, rope: Rope | None, head_dim: int) -> None:
    """pre_rope needs a rope or similarity keys; post_rope takes neither of the latter."""
    graph = plan.policy.graph
    if similarity_keys and (graph is None or graph.similarity != "pre_rope"):
        raise invalid("similarity_keys", "given", 'left out unless graph.similarity is "pre_rope"', reason=Reason.BAD_SHAPE)
    if not plan.policy.needs_rope or similarity_keys:
        return
    if rope is None:
        message = 'graph.similarity is "pre_rope", which needs rope= (Rope.from_config(model.config)) or similarity_keys='
        raise InvalidInputError(message, argument="rope", reason=Reason.ROPE_MISSING)
    if rope.rotary_dim > head_dim:
        raise invalid("rope.rotary_dim", rope.rotary_dim, f"at most head_dim, {head_dim}", reason=Reason.BAD_SHAPE)
