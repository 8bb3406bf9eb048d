"""Header: what a call is about, all that a server needs to refuse it before the first tensor arrives."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from graphkv.terms.always_kept import Range
from graphkv.terms.catalogue import OUTPUTS
from graphkv.terms.errors import InvalidInputError, Reason, invalid, unknown_name
from graphkv.terms.needs import check_outputs
from graphkv.terms.policy import Policy
from graphkv.terms.rope import Rope
from graphkv_proto import v1 as pb
from graphkv_proto.encodings import ENCODINGS
from graphkv_proto.messages import _names as names
from graphkv_proto.messages.policy import read_policy, read_rope, write_policy, write_rope

__all__ = ["FEATURES", "MAX_PINNED", "MAX_PROMPTS", "MAX_TOKENS", "MINOR", "Header", "Prompt", "read_header", "write_header"]

MINOR = 0
"""The minor version of graphkv.v1 that this is."""
FEATURES = ("candidates", "token_ranges", "all_scores", "pages", "outputs")
"""What a caller may require: the narrowed form, layers whose tokens come in ranges, the narrowed form with the scores of all
tokens, answers in pages, and outputs."""
MAX_PROMPTS = 2**12
MAX_PINNED = 2**12
"""Pinned ranges of all prompts together."""
MAX_TOKENS = 2**31 - 1
"""Tokens of a prompt: answers are int32."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: `tokens` n, and the ranges (start, stop) that are always kept."""

    tokens: int
    pinned: tuple[Range, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first part of a request; see the message Header for each field.

    `layers` L of the model, `query_heads` Hq (0 where neither queries nor attention come), `kv_heads` Hkv, `head_dim` d;
    sizes in bytes. `caller_scores`: the caller's scores decide instead of the policy's scorer. `request_id` is "" where
    the caller gave none, or one that is not 1 to 64 of A-Z a-z 0-9 . _ -. `outputs`: what the answers hold besides the
    tokens, names from `graphkv.terms.catalogue.OUTPUTS` that the policy can give.
    """

    policy: Policy
    layers: int
    kv_heads: int
    head_dim: int
    largest_layer_bytes: int
    total_bytes: int
    prompts: tuple[Prompt, ...]
    query_heads: int = 0
    caller_scores: bool = False
    encoding: str = "exact"
    rope: Rope | None = None
    request_id: str = ""
    priority: int = 0
    required_features: tuple[str, ...] = ()
    minor: int = MINOR
    outputs: tuple[str, ...] = ()


def write_header(header: Header) -> pb.Header:
    """Raises InvalidInputError where a policy's number is beyond int64, or the request id is none."""
    if header.request_id and not _REQUEST_ID.fullmatch(header.request_id):
        raise invalid("request_id", names.shown(header.request_id), "1 to 64 of A-Z a-z 0-9 . _ -", reason=Reason.BAD_SHAPE)
    return pb.Header(
        minor=header.minor,
        required_features=header.required_features,
        request_id=header.request_id,
        policy=write_policy(header.policy),
        fingerprint=header.policy.fingerprint,
        encoding=names.ENCODING.label(header.encoding, "encoding"),
        layers=header.layers,
        query_heads=header.query_heads,
        kv_heads=header.kv_heads,
        head_dim=header.head_dim,
        importance=pb.IMPORTANCE_CALLER if header.caller_scores else pb.IMPORTANCE_SCORER,
        largest_layer_bytes=header.largest_layer_bytes,
        total_bytes=header.total_bytes,
        prompts=[
            pb.Prompt(tokens=prompt.tokens, pinned=[pb.TokenRange(start=start, stop=stop) for start, stop in prompt.pinned])
            for prompt in header.prompts
        ],
        rope=None if header.rope is None else write_rope(header.rope),
        outputs=[names.OUTPUT.label(output, "outputs") for output in header.outputs],
        priority=header.priority,
    )


def read_header(message: pb.Header, *, features: Collection[str] = FEATURES) -> Header:
    """What the caller wants, checked as far as it can be without knowing a server's limits.

    `features`: those that a caller may require here. Raises InvalidInputError whose argument is the field's path:
    BAD_POLICY, BAD_SHAPE, TOO_LARGE, FINGERPRINT, and UNKNOWN_NAME for an enum value, a feature or a field in use that
    this version does not have.
    """
    for feature in message.required_features:
        if feature not in features:
            raise unknown_name("required_features", names.shown(feature), features)
    _refuse_later_fields(message)
    encoding = names.ENCODING.read(message.encoding, "encoding", ENCODINGS)
    importance = names.IMPORTANCE.read(message.importance, "importance")
    policy = _policy(message)
    for name in ("layers", "kv_heads", "head_dim"):
        _at_least(1, name, getattr(message, name))
    for name in ("query_heads", "largest_layer_bytes", "total_bytes"):
        _at_least(0, name, getattr(message, name))
    if message.query_heads % message.kv_heads:
        allowed = f"a multiple of the {message.kv_heads} KV heads"
        raise invalid("query_heads", message.query_heads, allowed, reason=Reason.BAD_SHAPE)
    return Header(
        policy=policy,
        layers=message.layers,
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        largest_layer_bytes=message.largest_layer_bytes,
        total_bytes=message.total_bytes,
        prompts=_prompts(message),
        query_heads=message.query_heads,
        caller_scores=importance == "caller",
        encoding=encoding,
        rope=read_rope(message.rope) if message.HasField("rope") else None,
        request_id=message.request_id if _REQUEST_ID.fullmatch(message.request_id) else "",
        priority=message.priority,
        required_features=tuple(message.required_features),
        minor=message.minor,
        outputs=_outputs(message, policy),
    )


def _refuse_later_fields(message: pb.Header) -> None:
    """What the contract has for later versions; they fill these checks with what they do instead."""
    if message.HasField("shard"):
        names.refuse("shard", names.shown(message.shard.group), "left out: this version joins no shards")
    if message.region_id:
        names.refuse("region_id", f"{len(message.region_id)} bytes", "left out: this version has no shared regions")


def _policy(message: pb.Header) -> Policy:
    if not message.HasField("policy"):
        raise invalid("policy", None, "given")
    policy = read_policy(message.policy)
    if message.fingerprint and message.fingerprint != policy.fingerprint:
        allowed = f"{policy.fingerprint}, the policy's here: the two ends understand it differently"
        raise invalid("fingerprint", names.shown(message.fingerprint), allowed, reason=Reason.FINGERPRINT)
    return policy


def _outputs(message: pb.Header, policy: Policy) -> tuple[str, ...]:
    """Each once, in the catalogue's order. Raises InvalidInputError where one is not known, or the policy cannot give it."""
    if len(message.outputs) > len(names.OUTPUT.names):
        allowed = f"each once, of the {len(names.OUTPUT.names)} there are"
        raise invalid("outputs", f"{len(message.outputs)} outputs", allowed, reason=Reason.TOO_LARGE)
    read = [names.OUTPUT.read(number, f"outputs[{place}]", OUTPUTS) for place, number in enumerate(message.outputs)]
    return check_outputs(policy, read)


def _prompts(message: pb.Header) -> tuple[Prompt, ...]:
    count = len(message.prompts)
    if not 1 <= count <= MAX_PROMPTS:
        reason = Reason.TOO_LARGE if count else Reason.BAD_SHAPE
        raise invalid("prompts", f"{count} prompts", f"1 to {MAX_PROMPTS}", reason=reason)
    room = MAX_PINNED
    prompts = []
    for place, prompt in enumerate(message.prompts):
        path, tokens = f"prompts[{place}]", prompt.tokens
        _at_least(1, f"{path}.tokens", tokens)
        if tokens > MAX_TOKENS:
            raise invalid(f"{path}.tokens", tokens, f"at most {MAX_TOKENS}", reason=Reason.TOO_LARGE)
        room -= len(prompt.pinned)
        if room < 0:
            raise _too_many_pinned(path)
        pinned = tuple((each.start, each.stop) for each in prompt.pinned)
        for number, (start, stop) in enumerate(pinned):
            if not 0 <= start < stop <= tokens:
                allowed = f"(start, stop) with 0 <= start < stop <= {tokens}"
                raise invalid(f"{path}.pinned[{number}]", (start, stop), allowed, reason=Reason.BAD_SHAPE)
        prompts.append(Prompt(tokens, pinned))
    return tuple(prompts)


def _too_many_pinned(path: str) -> InvalidInputError:
    allowed = f"no more than {MAX_PINNED} ranges in all prompts together"
    return invalid(f"{path}.pinned", "too long", allowed, reason=Reason.TOO_LARGE)


def _at_least(least: int, path: str, given: int) -> None:
    if given < least:
        raise invalid(path, given, f"an integer >= {least}", reason=Reason.BAD_SHAPE)
