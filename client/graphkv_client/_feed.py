"""Feed: what a stream was given and has not sent yet. Chunks of tokens come in, work that may be sent goes out.

Decides when the call can be opened (its header states every size), which chunks wait for the rest of their layer, and
what is missing. No thread, no clock, no socket: the streams of `client` and `aio` guard it and wait.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from graphkv.terms.always_kept import Range
from graphkv.terms.catalogue import SCORERS
from graphkv.terms.errors import Reason, invalid
from graphkv.terms.needs import check_graph_inputs, check_source, naming_values, reads_attention
from graphkv.terms.selection import LayerSelection
from graphkv.terms.shapes import IMPORTANCE_ROLES, Shapes
from graphkv_client._arrays import Answer, answer_like, is_tensor, recorded_event, wait_for, zeros
from graphkv_client._fallback import Unanswered, Waiting
from graphkv_client._inputs import CallTerms, arrays_of, check_sources, checked_pinned
from graphkv_client._pieces import Form, Part, Preparation, Work, joined, wire_dtype
from graphkv_client._preparation import preparation_for
from graphkv_client._puts import Gathering, Put
from graphkv_client.options import is_integer

__all__ = ["Feed", "Place", "Put"]

Place = tuple[int, int]
"""(prompt, layer)."""


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
        self.held = 0  # bytes of copies that were sent, and are kept for another sending
        self.whole = True  # whether all that has no answer is here still, so that it can be sent again
        self.answers: dict[Place, Answer] = {}  # the kind of array each layer came in
        self._pinned = pinned
        if tokens is not None:
            batched = isinstance(tokens, list | tuple)
            lengths = [_positive("num_tokens", one) for one in (tokens if batched else (tokens,))]  # type: ignore[union-attr]
            self.prompts = _prompts(lengths, pinned, batched=batched)
        self._layers: dict[Place, Gathering] = {}  # incomplete ones
        self._unanswered: dict[Place, Gathering] = {}  # complete ones
        self._handed: set[Place] = set()  # whose answers were handed out
        self._outlines: dict[Place, Part] = {}  # zeros in the place of those
        self._early: dict[Place, LayerSelection] = {}  # answers that wait for the rest of their prompt's
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
        layer = self._layers.get(place) or Gathering(prompts[put.prompt][0])
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
        layer.copies += put.copied
        self.copied += put.copied
        if layer.complete:
            self._done.add(place)
        for waiting in list(self._layers) if opening else [place]:
            self._queue_layer(waiting)

    def take(self) -> Work | None:
        """The next work that may be sent, in order, or None where all that came has gone or waits for more."""
        return self._queue.popleft() if self._queue else None

    def sent(self, work: Work) -> None:
        """The work's bytes have left: its copies are not needed any more, unless it has to be sent again."""
        self.copied -= work.copied
        if self.whole:
            self.held += work.copied

    def let_go(self) -> bool:
        """Drops what was sent, to make room for more; nothing can be sent again from now on. Whether there was anything."""
        if self.held <= 0:
            return False
        self.held, self.whole = 0, False
        self._unanswered.clear()
        for layer in self._layers.values():
            if self.preparation is not None and not self.preparation.computes:
                layer.forget()
        return True

    def rewind(self) -> None:
        """All is to be sent again, to another replica: what has no answer as it was put, the rest in outline."""
        self.copied, self.held = self.copied + self.held, 0
        self._early.clear()
        self._queue.clear()
        for place, outline in self._outlines.items():
            self._queue.append(self._work(place, outline))
        complete, self._unanswered = self._unanswered, {}
        self._layers = complete | self._layers
        for place, layer in list(self._layers.items()):
            layer.queued, layer.copied = 0, layer.copies
            self._queue_layer(place)

    def answered(self, selections: Sequence[LayerSelection]) -> list[LayerSelection]:
        """The answers that may be handed out now, each once: those that came in an earlier sending were.

        Where all layers of a prompt are chosen together, none is handed out before all are there: the others could not be
        chosen again without it.
        """
        fresh = {(one.prompt, one.layer): one for one in selections if (one.prompt, one.layer) not in self._handed}
        if self.terms.policy.needs_all_layers:
            self._early |= fresh
            count = 1 if self.terms.policy.granularity == "model" else self.layers
            came = Counter(prompt for prompt, _ in self._early)
            fresh = {place: one for place, one in self._early.items() if came[place[0]] == count}
            self._early = {place: one for place, one in self._early.items() if place not in fresh}
        shared = self.terms.policy.granularity == "model"
        for prompt, layer in fresh:
            for place in [(prompt, each) for each in range(self.layers)] if shared else [(prompt, layer)]:
                self._handed.add(place)
                self._forget(place)
        return list(fresh.values())

    def waiting(self, *, arrays: bool) -> list[Unanswered]:
        """What was not handed out, once all was put; with what was put (only while it is `whole`), if that is needed.

        For the thread that computes with it.
        """
        if self.form is None:
            raise RuntimeError("nothing waits for an answer before the form of the layers is known")
        found = []
        for prompt, (tokens, pinned) in enumerate(self.prompts):
            own = {place[1]: self._waiting(place, arrays) for place in self.answers if place[0] == prompt}
            own = {layer: one for layer, one in own.items() if (prompt, layer) not in self._handed}
            if own:
                heads, scored = self.form.shapes.kv_heads, self.form.caller_scores
                found.append(Unanswered(prompt, tokens, pinned, self.layers, heads, scored, own))
        return found

    def _waiting(self, place: Place, arrays: bool) -> Waiting:
        parts = self._unanswered[place].parts if arrays and place in self._unanswered else []
        for part in parts:
            wait_for(part.ready, part.arrays["keys"])
        return Waiting(joined(parts) if parts else {}, self.answers[place])

    def _forget(self, place: Place) -> None:
        """The layer was answered: its arrays are the caller's again."""
        layer = self._unanswered.pop(place, None)
        if layer is not None:
            self._outlines[place] = Part(0, {role: zeros(array, layer.dims[role]) for role, array in layer.first.items()})
            self.held -= layer.copies

    def _work(self, place: Place, part: Part) -> Work:
        """A whole layer in one part."""
        if self.preparation is None or self.form is None:
            raise RuntimeError("nothing is sent before the form of the layers is known")
        roles = self.preparation.ahead(self.form.dtypes, *place)
        return Work(*place, (part,) if roles else (), roles, (part,) if self.preparation.computes else ())

    def _check_range(self, put: Put, layer: Gathering) -> None:
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

    def _form(self, put: Put, layer: Gathering, dims: Mapping[str, tuple[int, ...]]) -> Form | None:
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
        if fresh or whole:
            freed = 0 if preparation.computes and not layer.complete else layer.copied
            layer.copied -= freed
            layer.queued = len(layer.parts)
            self._queue.append(Work(*place, fresh, roles, whole, freed))
        if layer.complete:
            del self._layers[place]
            if self.whole:
                self._unanswered[place] = layer
        elif not self.whole and not preparation.computes:
            layer.forget()


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
