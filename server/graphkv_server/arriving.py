"""One layer while its bytes arrive: which tensors it has, which it still needs, and where each byte belongs.

Trusts no descriptor: dims are checked in Python integers against the header before any memory is touched, ranges must
cover their tokens exactly once, and a layer is whole only when every byte of it has been written, so that a buffer's
old content is never read. Knows no message order, no checksum and no waiting (the assembler does).
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from graphkv_proto import tensors
from graphkv_proto.messages import Descriptor

from graphkv.budgets import LayerPlan
from graphkv.candidates import Candidates
from graphkv.layer import Layer
from graphkv.terms.catalogue import SCORERS
from graphkv.terms.errors import InvalidInputError, Reason, unknown_name
from graphkv.terms.needs import query_rows, reads_attention
from graphkv.terms.rope import Rope
from graphkv.terms.shapes import EXTRA_ROLES, IMPORTANCE_ROLES, Shapes
from graphkv_server.admission import Lease
from graphkv_server.buffers import Bytes
from graphkv_server.engine.work import Scored, Work

__all__ = ["ArrivingLayer", "Piece", "empty_layer", "misplaced"]

_ALIGNMENT = 64
_FLOATS = ("f64", "f32", "f16", "bf16", "f8_e4m3fn", "f8_e5m2")
_DTYPES: Mapping[str, tuple[str, ...]] = {
    "keys": _FLOATS,
    "similarity_keys": _FLOATS,
    "positions": ("i32", "i64"),
    "queries": _FLOATS,
    "attention": _FLOATS,
    "scores": ("f32",),
    "value_norms": ("f32",),
    "query_mean": ("f32",),
    "query_covariance": ("f32",),
    "candidate_ids": ("i32",),
    "row_facts": ("f64",),
}
_TORCH: Mapping[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8_e4m3fn": torch.float8_e4m3fn,
    "f8_e5m2": torch.float8_e5m2,
    "i32": torch.int32,
    "i64": torch.int64,
}
_RANGED = ("keys", "similarity_keys", "positions", "attention", "scores", "value_norms")
"""Roles whose tokens may come in ranges, in the whole form."""
_LAYOUT_ROLES = ("keys", "similarity_keys", "queries")
"""Roles that may come tokens first."""
_NARROWED_ROLES = ("candidate_ids", "row_facts", "scores", "keys", "similarity_keys", "positions")
_WHOLE_ROLES = ("keys", "similarity_keys", "positions", *IMPORTANCE_ROLES, *EXTRA_ROLES)


def misplaced(
    argument: str, where: str, given: object, allowed: str, *, reason: Reason = Reason.BAD_LAYOUT
) -> InvalidInputError:
    """A part of a request that is out of place: `raise misplaced("chunk.offset", "keys of layer 3", 10, "0")`."""
    return InvalidInputError(f"{argument} for {where} is {given!r}; it must be {allowed}", argument=argument, reason=reason)


@dataclass(slots=True, eq=False)
class Tensor:
    """All of one role of a layer, heads first: `memory` its bytes, `dims` its axes, `ranges` the tokens described so far."""

    role: str
    dtype: str
    dims: tuple[int, ...]
    memory: Bytes
    missing: int  # bytes not written yet
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def as_torch(self) -> torch.Tensor:
        """The tensor itself, on the buffer's memory."""
        if not self.memory.nbytes:
            return torch.empty(self.dims, dtype=_TORCH[self.dtype])
        return torch.frombuffer(self.memory.data, dtype=_TORCH[self.dtype]).view(self.dims)


@dataclass(slots=True, eq=False)
class Piece:
    """What one descriptor announced: a tensor, or a range of its tokens; `received` bytes of it so far."""

    layer: "ArrivingLayer"
    descriptor: Descriptor
    tensor: Tensor
    received: int = 0

    @property
    def where(self) -> str:
        """What it is, for messages: no caller's text in it."""
        return f"{self.descriptor.role} of {self.layer.where}"

    @property
    def missing(self) -> int:
        """Bytes that have not come."""
        return self.descriptor.byte_length - self.received

    def write(self, offset: int, chunk: bytes) -> None:
        """Takes the next bytes to their place. Raises InvalidInputError (BAD_LAYOUT)."""
        if offset != self.received:
            allowed = f"{self.received}, as many bytes as came before"
            raise misplaced("chunk.offset", self.where, offset, allowed)
        if not chunk:
            raise misplaced("chunk.data", self.where, "0 bytes", "at least one byte")
        if len(chunk) > self.missing:
            allowed = f"at most {self.missing} bytes, which are left of the declared {self.descriptor.byte_length}"
            raise misplaced("chunk.data", self.where, f"{len(chunk)} bytes", allowed)
        tensors.place(chunk, offset, self.descriptor, self.tensor.memory, self.tensor.dims)
        self.received += len(chunk)
        self.tensor.missing -= len(chunk)


class ArrivingLayer:
    """One layer of one prompt, its tensors in the memory of `lease`.

    shapes: the prompt's sizes. largest: the most bytes the header allows for one layer.
    """

    def __init__(self, plan: LayerPlan, shapes: Shapes, prompt: int, lease: Lease, *, largest: int, rope: Rope | None) -> None:
        self.plan = plan
        self.prompt = prompt
        self.lease = lease
        self.where = f"layer {plan.layer}" if prompt == 0 else f"layer {plan.layer} of prompt {prompt}"
        self._shapes = shapes
        self._largest = largest
        self._rope = rope
        self._narrowed: bool | None = None
        self._scored = plan.allocated and plan.needs_all_scores and plan.candidates is not None
        self._whole_only = not plan.allocated or (plan.needs_all_scores and plan.candidates is None)
        self._tensors: dict[str, Tensor] = {}
        self._memory: Bytes | None = None
        self._used = 0
        self.size = 0  # bytes of all tensors described so far
        self.pieces: list[int] = []  # the ids of their descriptors

    def describe(self, descriptor: Descriptor) -> Piece:
        """Makes room for a tensor or a range of it. Raises InvalidInputError naming role, layer, expected and got."""
        role = descriptor.role
        if role not in _DTYPES:
            raise unknown_name("descriptor.role", role, _DTYPES)
        if descriptor.dtype not in _DTYPES[role]:
            self._refuse("descriptor.dtype", role, descriptor.dtype, "one of " + ", ".join(_DTYPES[role]), Reason.BAD_SHAPE)
        if descriptor.layout == "NHD" and role not in _LAYOUT_ROLES:
            self._refuse("descriptor.layout", role, "NHD", "HND", Reason.BAD_SHAPE)
        self._check_form(descriptor)
        start, stop = self._token_range(descriptor)
        dims = self._whole_dims(descriptor, stop - start)
        item = tensors.item_size(descriptor.dtype)
        tensor = self._tensors.get(role) or self._allocate(role, descriptor.dtype, dims, item)
        if (tensor.dtype, tensor.dims) != (descriptor.dtype, dims):
            allowed = f"{tensor.dtype} {list(tensor.dims)}, as its first range"
            self._refuse("descriptor.dims", role, f"{descriptor.dtype} {list(dims)}", allowed, Reason.BAD_SHAPE)
        place = bisect.bisect(tensor.ranges, (start, stop))
        for other_start, other_stop in tensor.ranges[max(0, place - 1) : place + 1]:
            if start < other_stop and other_start < stop:
                given, allowed = f"tokens {start} to {stop}", f"outside {other_start} to {other_stop}, which came already"
                self._refuse("descriptor.start", role, given, allowed, Reason.BAD_LAYOUT)
        tensor.ranges.insert(place, (start, stop))
        return Piece(self, descriptor, tensor)

    def whole(self) -> bool:
        """Whether every tensor described, and every one that is needed, has all its bytes."""
        return not any(tensor.missing for tensor in self._tensors.values()) and not self._absent()

    def missing(self) -> str | None:
        """The first thing that is missing, in words, or None."""
        for tensor in self._tensors.values():
            if tensor.missing:
                return f"{tensor.role} of {self.where}: {tensor.missing} of {tensor.memory.nbytes} bytes are missing"
        absent = self._absent()
        return f"{absent} of {self.where} did not come" if absent else None

    def build(self) -> Work:
        """The layer for the engine, on the buffer's memory. Raises InvalidInputError where its tensors do not fit."""
        given = {role: tensor.as_torch() for role, tensor in self._tensors.items()}
        if self._narrowed and self._scored:
            ids, scores = given.pop("candidate_ids"), given.pop("scores")
            return Scored(self.plan, scores, ids, rope=self._rope, **given)
        if self._narrowed:
            # W is 0 where these did not come, else they are needed.
            empty = torch.empty((self._shapes.kv_heads, self.plan.candidate_width))
            return Candidates(
                self.plan,
                ids=given.get("candidate_ids", empty.to(torch.int32)),
                scores=given.get("scores", empty),
                facts=given["row_facts"],
                keys=given.get("keys"),
                similarity_keys=given.get("similarity_keys"),
                positions=given.get("positions"),
                rope=self._rope,
            )
        if "keys" not in given:
            # Nothing reads them (see _absent), but a layer's sizes are those of its keys: one number, seen as all of them.
            given["keys"] = torch.zeros(()).expand(self._shapes.dims("keys"))
        return Layer(self.plan, rope=self._rope, **given)

    def _check_form(self, descriptor: Descriptor) -> None:
        """Whole or narrowed, by the first tensor that can only be of one: the narrowed form has slots in the place of tokens,
        so no count; but for the scores of all tokens, which are alike in both.
        """
        role, refuse = descriptor.role, functools.partial(self._refuse, "descriptor.role", descriptor.role)
        narrowed = role in ("candidate_ids", "row_facts") or (role in _RANGED and descriptor.count == 0)
        if self._scored and role == "row_facts":
            refuse("given", "left out: they follow from the scores of all tokens", Reason.BAD_LAYOUT)
        if self._scored and role == "scores":
            if not descriptor.count:
                allowed = f"[Hkv, {self._shapes.tokens}], or a range of it: the answer depends on the scores of all tokens"
                self._refuse("descriptor.dims", role, list(descriptor.dims), allowed, Reason.BAD_SHAPE)
        elif self._whole_only and narrowed:
            reason = "needs the scores of all tokens" if self.plan.allocated else "takes candidates when all layers are there"
            refuse("of the narrowed form", f"one of the whole form: this policy {reason}", Reason.BAD_LAYOUT)
        elif self._narrowed is None:
            self._narrowed = narrowed
        ambiguous = self._scored and role == "scores"
        if (not ambiguous and self._narrowed != narrowed) or role not in (_NARROWED_ROLES if narrowed else _WHOLE_ROLES):
            form = "narrowed" if self._narrowed else "whole"
            allowed = f"one of the {form} form, as what came before"
            refuse(f"of the {'narrowed' if narrowed else 'whole'} form", allowed, Reason.BAD_LAYOUT)
        self._check_source(role)

    def _check_source(self, role: str) -> None:
        """One source of importance, and the one that the header and the policy speak of."""
        refuse = functools.partial(self._refuse, "descriptor.role", role)
        if self.plan.caller_scores and role in ("queries", "attention"):
            refuse("given", "left out: the header says that scores are the caller's", Reason.BAD_SHAPE)
        if role == "scores" and self.plan.policy.budget_allocation == "cake":
            refuse("given", "left out: the budgets come from queries or attention", Reason.BAD_SHAPE)
        if role in IMPORTANCE_ROLES and not self._narrowed:
            others = [other for other in IMPORTANCE_ROLES if other in self._tensors and other != role]
            if others:
                refuse("given", f"left out where {others[0]} came", Reason.BAD_SHAPE)

    def _by_token(self, role: str) -> bool:
        """Whether a role has an entry a token here, and so may come in ranges."""
        return role in _RANGED and (not self._narrowed or (self._scored and role == "scores"))

    def _token_range(self, descriptor: Descriptor) -> tuple[int, int]:
        """The tokens it covers; the whole axis for what has no ranges."""
        if not self._by_token(descriptor.role):
            if descriptor.start or descriptor.count:
                self._refuse(
                    "descriptor.count", descriptor.role, descriptor.count, "0: it is no range of tokens", Reason.BAD_LAYOUT
                )
            return 0, 1
        start, stop, tokens = descriptor.start, descriptor.start + descriptor.count, self._shapes.tokens
        if not 0 <= start < stop <= tokens:
            allowed = f"a range within the {tokens} tokens of the prompt"
            self._refuse("descriptor.start", descriptor.role, f"tokens {start} to {stop}", allowed, Reason.BAD_LAYOUT)
        return start, stop

    def _whole_dims(self, descriptor: Descriptor, count: int) -> tuple[int, ...]:
        """The dims of the whole role, heads first, after checking the descriptor's own."""
        role, given = descriptor.role, tuple(descriptor.dims)
        if descriptor.layout == "NHD" and len(given) == 3:
            given = (given[1], given[0], given[2])
        if not self._narrowed or self._by_token(role):
            axis = 0 if role == "positions" and len(given) == 1 else 2 if role == "attention" else 1
            if role in _RANGED and len(given) > axis and given[axis] == count:
                given = (*given[:axis], self._shapes.tokens, *given[axis + 1 :])
            self._sizes(role, given).check(role, given)
            return given
        heads, width = self._shapes.kv_heads, self.plan.candidate_width
        wanted: dict[str, tuple[int, ...]] = {
            "row_facts": (heads, 3),
            "keys": (heads, width, self._shapes.head_dim),
            "similarity_keys": (heads, width, given[2] if len(given) == 3 and given[2] > 0 else 1),
        }
        expected = wanted.get(role, (heads, width))
        if given != expected:
            self._refuse("descriptor.dims", role, list(given), str(list(expected)), Reason.BAD_SHAPE)
        return given

    def _sizes(self, role: str, given: tuple[int, ...]) -> Shapes:
        """The prompt's sizes; where the scorer takes any number of last queries, as many as came."""
        if role not in ("queries", "attention") or query_rows(self.plan.policy, self._shapes.tokens) is not None:
            return self._shapes
        rows = given[1] if len(given) == 3 else 0
        return dataclasses.replace(self._shapes, window=rows if rows <= self._shapes.tokens else 0)

    def _allocate(self, role: str, dtype: str, dims: Sequence[int], item: int) -> Tensor:
        size = math.prod(dims) * item
        if self.size + size > self._largest:
            allowed = f"at most {self._largest - self.size}, which are left of the header's largest_layer_bytes {self._largest}"
            self._refuse("descriptor.byte_length", role, size, allowed, Reason.BAD_LAYOUT)
        if self._memory is None:
            self._memory = self.lease.buffer(self._largest + len(_DTYPES) * _ALIGNMENT).memory
        memory = self._memory[self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.size += size
        tensor = Tensor(role, dtype, tuple(dims), memory, size)
        self._tensors[role] = tensor
        return tensor

    def _absent(self) -> str | None:
        """The first role that is needed and was not described; None where the layer has all it needs."""
        given = self._tensors
        if self._narrowed:
            needed = [] if self._scored else ["row_facts"]
            needed += ["candidate_ids", "scores"] if self.plan.candidate_width else []
            if self.plan.needs_keys and "similarity_keys" not in given and self.plan.candidate_width:
                needed.append("keys")
            return next((role for role in needed if role not in given), None)
        policy, terms = self.plan.policy, SCORERS[self.plan.policy.scorer]
        source = next((role for role in IMPORTANCE_ROLES if role in given), None)
        if source is None and (self.plan.caller_scores or policy.scorer == "given"):
            return "scores"
        if source is None and reads_attention(policy):
            return "queries"
        if source != "scores":
            lacking = next((role for role in terms.needs if role not in given), None)
            if lacking is not None:
                return lacking
        scorer_reads_keys = source != "scores" and terms.reads_keys and not terms.reads_attention
        graph_reads_keys = self.plan.needs_keys and "similarity_keys" not in given
        read = source == "queries" or scorer_reads_keys or graph_reads_keys
        return "keys" if read and "keys" not in given else None

    def _refuse(self, argument: str, role: str, given: object, allowed: str, reason: Reason) -> None:
        raise misplaced(argument, f"{role} of {self.where}", given, allowed, reason=reason)


def empty_layer(plan: LayerPlan, shapes: Shapes) -> Candidates:
    """The layer of a prompt that is kept whole and for which nothing came: nothing competes, so nothing is read."""
    heads = shapes.kv_heads
    facts = torch.zeros((heads, 3), dtype=torch.float64)
    return Candidates(plan, torch.empty((heads, 0), dtype=torch.int32), torch.empty((heads, 0)), facts)
