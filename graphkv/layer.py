"""Layer: one layer of one prompt as the algorithm sees it, its keys and where importance comes from, checked."""

from dataclasses import dataclass

import torch

from graphkv.arrays import floating
from graphkv.budgets import LayerPlan
from graphkv.terms.errors import Reason, invalid
from graphkv.terms.needs import check_graph_inputs, check_source
from graphkv.terms.rope import Rope
from graphkv.terms.shapes import EXTRA_ROLES, IMPORTANCE_ROLES, Shapes

__all__ = ["Layer"]


@dataclass(frozen=True, slots=True)
class Layer:
    """All tokens of one layer, on one device.

    keys [Hkv, n, d], queries [Hq, w, d], attention [Hq, w, n], scores [Hkv, n], similarity_keys [Hkv, n, x],
    value_norms [Hkv, n], query_mean [Hq, d], query_covariance [Hq, d, d]: any float dtype, any strides; positions [n] or
    [Hkv, n], integers. `scores` with a plan whose `caller_scores` is False were computed by the policy's own scorer.
    Raises InvalidInputError naming the argument.
    """

    plan: LayerPlan
    keys: torch.Tensor
    queries: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    similarity_keys: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    rope: Rope | None = None
    value_norms: torch.Tensor | None = None
    query_mean: torch.Tensor | None = None
    query_covariance: torch.Tensor | None = None

    def __post_init__(self) -> None:
        roles = ("keys", *IMPORTANCE_ROLES, *EXTRA_ROLES, "similarity_keys", "positions")
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
        sources = [role for role in IMPORTANCE_ROLES if role in given]
        extras = [role for role in EXTRA_ROLES if role in given]
        check_source(self.plan.policy, sources, rows=shapes.window, num_tokens=shapes.tokens, extras=extras)
        check_graph_inputs(
            self.plan.policy,
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
        source = next((own for own in (self.queries, self.attention, self.query_mean) if own is not None), None)
        return 0 if source is None else source.shape[0] // self.kv_heads
