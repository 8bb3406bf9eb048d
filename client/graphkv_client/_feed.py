"""Feed: what a stream was given and has not sent yet. Chunks of tokens come in, work that may be sent goes out.

Decides when the call can be opened (its header states every size), which chunks wait for the rest of their layer, and
what is missing. No thread, no clock, no socket: the streams of `client` and `aio` guard it and wait.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphkv_proto.tensors import TOKEN_AXIS

from graphkv.terms.always_kept import Range
from graphkv.terms.catalogue import SCORERS
from graphkv.terms.errors import Reason, invalid
from graphkv.terms.needs import check_graph_inputs, check_source, naming_values, reads_attention
from graphkv.terms.shapes import IMPORTANCE_ROLES, Shapes
from graphkv_client._arrays import Answer, answer_like, copied, is_tensor, recorded_event
from graphkv_client._inputs import CallTerms, arrays_of, check_sources, checked_pinned
from graphkv_client._pieces import Form, Part, Preparation, Work, wire_dtype
from graphkv_client._preparation import preparation_for
from graphkv_client.options import is_integer

__all__ = ["Feed", "Place", "Put"]

Place = tuple[int, int]
"""(prompt, layer)."""


@dataclass(frozen=True, slots=True)
class Put:
    """One put, read and checked as far as it can be alone. `start`: None for a whole layer; `copied`: bytes, if copies."""

    prompt: int
    layer: int
    start: int | None
    arrays: Mapping[str, Any]
    answer: Answer
    copied: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens its keys have."""
        return int(self.arrays["keys"].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(int(array.nbytes) for array in self.arrays.values())

    def shapes(self, whole: int | None) -> Shapes:
        """The sizes of this chunk, its arrays checked against each other; sources may span the `whole` prompt instead."""
        dims = {role: tuple(array.shape) for role, array in self.arrays.items()}
        if len(dims["keys"]) == 3 and dims["keys"][1] == 0:
            raise invalid("keys", "0 tokens", "at least one token", reason=Reason.BAD_LAYOUT)
        for role in ("attention", "scores", "value_norms"):
            if role in dims and len(dims["keys"]) == 3 and dims[role][-1:] == (whole,):
                dims[role] = (*dims[role][:-1], dims["keys"][1])
        return Shapes.of_layer(dims)

    def copy(self) -> "Put":
        """The same with copies of the arrays, which the caller cannot change."""
        return replace(self, arrays={role: copied(array) for role, array in self.arrays.items()}, copied=self.nbytes)


class _Layer:
    """What came of one layer and has not all been queued. A put costs the same however many came before."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.came = 0  # tokens
        self.parts: list[Part] = []
        self.queued = 0  # parts[:queued] were
        self.copied = 0
        self.dims: dict[str, tuple[int, ...]] = {}  # of its roles, as if the parts were joined
        self.first: dict[str, Any] = {}  # of each role that came, the first of its arrays
        self._ranges: list[Range] = []  # that came, ascending; neighbours are one

    @property
    def complete(self) -> bool:
        """Whether all tokens came."""
        return self.came == self.tokens

    def joined(self, arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The dims of its roles with these arrays; raises InvalidInputError where they do not fit what came."""
        return self.dims | {role: _joined(role, self.dims.get(role), tuple(array.shape)) for role, array in arrays.items()}

    def overlapped(self, start: int, stop: int) -> Range | None:
        """A range that came before and shares tokens with this one, or None."""
        place = bisect_left(self._ranges, (start, start))
        near = self._ranges[max(0, place - 1) : place + 1]
        return next((one for one in near if start < one[1] and one[0] < stop), None)

    def add(self, part: Part, dims: dict[str, tuple[int, ...]]) -> None:
        """Takes a part that fits; `dims`: what `joined` said of it."""
        self.parts.append(part)
        self.came += part.tokens
        self.dims = dims
        self.first = {**part.arrays, **self.first}
        start, stop = part.start, part.start + part.tokens
        place = bisect_left(self._ranges, (start, stop))
        if place and self._ranges[place - 1][1] == start:
            place -= 1
            start = self._ranges.pop(place)[0]
        if place < len(self._ranges) and self._ranges[place][0] == stop:
            stop = self._ranges.pop(place)[1]
        self._ranges.insert(place, (start, stop))


class Feed:
    """The layers of a stream. `tokens`: n of each prompt, or None where whole layers of one prompt come.

    Raises InvalidInputError naming the argument.
    """

    def __init__(self, terms: CallTerms, *, layers: int, tokens: int | Sequence[int] | None, pinned: Any) -> None:
        self.terms = terms
        self.layers = _positive("num_layers", layers)
        self.form: Form | None = None
        self.preparation: Preparation | None = None
        self.prompts: tuple[tuple[int, tuple[Range, ...]], ...] = ()  # (n, pinned) of each; () = not known yet
        self.copied = 0  # bytes of copies that were not sent yet
        self.answers: dict[Place, Answer] = {}  # the kind of array each layer came in
        self._pinned = pinned
        if tokens is not None:
            batched = isinstance(tokens, list | tuple)
            lengths = [_positive("num_tokens", one) for one in (tokens if batched else (tokens,))]  # type: ignore[union-attr]
            self.prompts = _prompts(lengths, pinned, batched=batched)
        self._layers: dict[Place, _Layer] = {}
        self._done: set[Place] = set()
        self._queue: deque[Work] = deque()
        self._on_torch: bool | None = None  # the kind of the keys; None before the first put
        self._dtypes: dict[str, str] = {}  # of the roles that came, in any layer

    @property
    def complete(self) -> bool:
        """Whether every layer was put."""
        return bool(self.prompts) and len(self._done) == self.layers * len(self.prompts)

    @property
    def idle(self) -> bool:
        """Whether nothing can be sent until more is put."""
        return not self._queue

    def missing(self) -> str:
        """What was not put, in words."""
        places = [(prompt, layer) for prompt in range(len(self.prompts) or 1) for layer in range(self.layers)]
        absent = [place for place in places if place not in self._done]
        if not absent:
            return "nothing is missing"
        first = f"layer {absent[0][1]}" + (f" of prompt {absent[0][0]}" if len(self.prompts) > 1 else "")
        if absent[0] in self._layers:
            layer = self._layers[absent[0]]
            first += f", of which {layer.came} of {layer.tokens} tokens came"
        return f"{len(absent)} of {len(places)} layers were not put; the first is {first}"

    @naming_values()
    def read(self, layer: int, given: Mapping[str, Any], *, prompt: int, start: int | None) -> Put:
        """One put, checked without regard to others. Changes nothing."""
        if given["keys"] is None:
            raise invalid("keys", None, "given", reason=Reason.BAD_SHAPE)
        _within("layer", layer, self.layers)
        _within("prompt", prompt, len(self.prompts) or 1)
        if start is not None and (not is_integer(start) or start < 0):
            raise invalid("start", start, "the place of the chunk's first token", reason=Reason.BAD_LAYOUT)
        layer, prompt, start = int(layer), int(prompt), None if start is None else int(start)
        if start and not self.prompts:
            raise invalid("start", start, "left out unless stream() was given num_tokens=", reason=Reason.BAD_LAYOUT)
        put = Put(prompt, layer, start, arrays_of(given, self.terms), answer_like(given["keys"]))
        shapes = put.shapes(self.prompts[prompt][0] if self.prompts else None)
        sources = [role for role in IMPORTANCE_ROLES if role in put.arrays]
        if len(sources) > 1:
            check_source(self.terms.policy, sources, rows=0, num_tokens=1)
        similar = "similarity_keys" in put.arrays
        check_graph_inputs(self.terms.policy, similarity_keys=similar, rope=self.terms.rope, head_dim=shapes.head_dim)
        return put

    @naming_values()
    def add(self, put: Put) -> None:
        """Takes a put; raises InvalidInputError, and changes nothing, where it does not fit what came before."""
        place = (put.prompt, put.layer)
        on_torch = is_tensor(put.arrays["keys"])
        if place in self._done:
            raise invalid("layer", put.layer, "one that was not put before", reason=Reason.BAD_LAYOUT)
        if self._on_torch not in (None, on_torch):
            raise invalid("keys", "another kind of array", "of the kind that was put before", reason=Reason.BAD_SHAPE)
        dtypes = self._dtypes | {role: self._dtype(role, array) for role, array in put.arrays.items()}
        prompts = self.prompts or _prompts([put.tokens], self._pinned, batched=False)
        layer = self._layers.get(place) or _Layer(prompts[put.prompt][0])
        self._check_range(put, layer)
        dims = layer.joined(put.arrays)
        form = self._form(put, layer, dims)
        opening = form is not None and self.preparation is None
        if form is not None and opening:
            self.preparation = preparation_for(
                self.terms, prompts, self.layers, on_torch=on_torch, caller_scores=form.caller_scores
            )
            self.form = form
        layer.add(Part(put.start or 0, put.arrays, recorded_event(put.arrays["keys"])), dims)
        self.prompts, self._on_torch, self._dtypes = prompts, on_torch, dtypes
        self._layers[place] = layer
        self.answers.setdefault(place, put.answer)
        layer.copied += put.copied
        self.copied += put.copied
        if layer.complete:
            self._done.add(place)
        for waiting in list(self._layers) if opening else [place]:
            self._queue_layer(waiting)

    def take(self) -> Work | None:
        """The next work that may be sent, in order, or None where all that came has gone or waits for more."""
        return self._queue.popleft() if self._queue else None

    def sent(self, work: Work) -> None:
        """The work's bytes have left: its copies are no longer counted."""
        self.copied -= work.copied

    def _check_range(self, put: Put, layer: _Layer) -> None:
        if put.start is None and put.tokens != layer.tokens:
            allowed = f"{layer.tokens}, as the prompt; start= says where a chunk begins"
            raise invalid("keys", f"{put.tokens} tokens", allowed, reason=Reason.BAD_SHAPE)
        start = put.start or 0
        stop = start + put.tokens
        if stop > layer.tokens:
            allowed = f"a range within the prompt's {layer.tokens} tokens"
            raise invalid("keys", f"tokens {start} to {stop}", allowed, reason=Reason.BAD_LAYOUT)
        if (before := layer.overlapped(start, stop)) is not None:
            allowed = f"outside tokens {before[0]} to {before[1]} of layer {put.layer}, put before"
            raise invalid("start", f"tokens {start} to {stop}", allowed, reason=Reason.BAD_LAYOUT)

    def _dtype(self, role: str, array: Any) -> str:
        """The dtype that the array travels as; raises InvalidInputError where the role came as another before."""
        name = wire_dtype(role, array)
        before = self._dtypes.get(role, name)
        if name != before:
            raise invalid(role, name, f"{before}, as in the chunk or layer before", reason=Reason.BAD_SHAPE)
        return name

    def _form(self, put: Put, layer: _Layer, dims: Mapping[str, tuple[int, ...]]) -> Form | None:
        """The form that the layer tells with this put, whose dims are these then, checked against the one known.

        None where they do not tell enough.
        """
        policy = self.terms.policy
        if layer.came + put.tokens == layer.tokens:
            shapes = Shapes.of_layer(dims, layers=self.layers)
            check_sources(policy, dims, shapes)
            form = Form.of({**put.arrays, **layer.first}, shapes)
            if self.form is not None:
                _check_alike(form, self.form, complete=True)
            return form
        if self.form is not None:
            _check_alike(Form.of(put.arrays, put.shapes(layer.tokens)), self.form, complete=False)
            return None
        source = next((role for role in IMPORTANCE_ROLES if role in put.arrays), None)
        needs = () if source == "scores" else SCORERS[policy.scorer].needs
        if (source is None and reads_attention(policy)) or any(role not in put.arrays for role in needs):
            return None
        form = Form.of(put.arrays, put.shapes(layer.tokens))
        return replace(form, dtypes={**form.dtypes, "scores": "f32"}) if policy.scorer == "given" else form

    def _queue_layer(self, place: Place) -> None:
        """Queues what may be sent of a layer now, if anything."""
        preparation, form, layer = self.preparation, self.form, self._layers[place]
        if preparation is None or form is None:
            return
        roles = preparation.ahead(form.dtypes, *place)
        fresh = tuple(layer.parts[layer.queued :]) if roles else ()
        whole = tuple(layer.parts) if layer.complete and preparation.computes else ()
        if not fresh and not whole:
            return
        freed = 0 if preparation.computes and not layer.complete else layer.copied
        layer.copied -= freed
        layer.queued = len(layer.parts)
        self._queue.append(Work(*place, fresh, roles, whole, freed))
        if layer.complete:
            del self._layers[place]


def _joined(role: str, before: tuple[int, ...] | None, given: tuple[int, ...]) -> tuple[int, ...]:
    """The dims of a role after another chunk of it."""
    axis = TOKEN_AXIS.get(role)
    if before is None:
        return given
    if axis is None:
        raise invalid(role, "given twice", "given once for each layer", reason=Reason.BAD_LAYOUT)
    if given and len(before) == len(given):
        place = axis % len(given)
        if (*before[:place], *before[place + 1 :]) == (*given[:place], *given[place + 1 :]):
            return (*given[:place], before[place] + given[place], *given[place + 1 :])
    raise invalid(role, list(given), f"of the sizes of the chunk before, {list(before)}", reason=Reason.BAD_SHAPE)


def _check_alike(given: Form, first: Form, *, complete: bool) -> None:
    """All layers of a stream have one form: the header stated it. Of an incomplete layer, as far as it came."""
    different = set(given.dtypes) - set(first.dtypes)
    if complete:
        different |= set(first.dtypes) - set(given.dtypes)
    if different:
        arrays, allowed = ", ".join(sorted(given.dtypes)), ", ".join(sorted(first.dtypes))
        raise invalid(
            sorted(different)[0], f"a layer of {arrays}", f"{allowed}, as the stream's first", reason=Reason.BAD_SHAPE
        )
    sizes = [
        ("keys", given.shapes.kv_heads, first.shapes.kv_heads),
        ("keys", given.shapes.head_dim, first.shapes.head_dim),
        ("queries", given.shapes.query_heads, first.shapes.query_heads),
        ("attention", given.shapes.query_heads, first.shapes.query_heads),
        ("similarity_keys", given.extra, first.extra),
        ("positions", given.position_rows, first.position_rows),
    ]
    for role, size, wanted in sizes:
        if role in given.dtypes and size != wanted:
            allowed = f"the sizes of the stream's first layer: {first.shapes.describe()}"
            raise invalid(role, given.shapes.describe(), allowed, reason=Reason.BAD_SHAPE)


def _prompts(tokens: Sequence[int], pinned: Any, *, batched: bool) -> tuple[tuple[int, tuple[Range, ...]], ...]:
    """(n, pinned ranges) of each prompt."""
    if not tokens:
        raise invalid("num_tokens", tokens, "at least one prompt", reason=Reason.BAD_SHAPE)
    own = pinned if batched else (pinned,)
    if own is None:
        own = [None] * len(tokens)
    if not isinstance(own, list | tuple) or len(own) != len(tokens):
        raise invalid("pinned", pinned, f"a list of {len(tokens)}, one for each prompt", reason=Reason.BAD_SHAPE)
    return tuple((one, checked_pinned(ranges, one)) for one, ranges in zip(tokens, own, strict=True))


def _positive(argument: str, given: Any) -> int:
    if not is_integer(given) or given < 1:
        raise invalid(argument, given, "an integer >= 1", reason=Reason.BAD_SHAPE)
    return int(given)


def _within(argument: str, given: Any, count: int) -> None:
    if not is_integer(given) or not 0 <= given < count:
        raise invalid(argument, given, f"an integer from 0 to {count - 1}", reason=Reason.BAD_SHAPE)
