"""One call as data: the messages to send, in order, and what their answers add up to. No socket, no clock, no thread.

`CompressClient` and `AsyncCompressClient` are two thin shells around it: they carry messages one way and the other.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphkv_proto import messages, tensors
from graphkv_proto.encodings import ENCODINGS
from graphkv_proto.messages import Descriptor, End, Header, Prompt

from graphkv.terms.always_kept import Range
from graphkv.terms.errors import InternalError, Reason, invalid, unknown_name
from graphkv.terms.selection import LayerSelection, Selection, Summary
from graphkv_client._arrays import Answer
from graphkv_client._fallback import WHERE, instead, unanswered
from graphkv_client._feed import Feed, Place
from graphkv_client._inputs import CallTerms, PromptInputs, prompts_of
from graphkv_client._pieces import Form, Part, Preparation, Work
from graphkv_client._preparation import preparation_for

__all__ = ["Call", "Selecting", "check_encoding", "fallen_back", "selecting", "streaming"]


class Call:
    """One sending of a Select call; sent again it is another. With granularity "model" a prompt has one answer, that of
    layer 0, else one a layer.

    prompts: (n, pinned ranges) of each; form: what its layers look like; answers: the kind of array that the answer for
    (prompt, layer) is wanted in, which a stream adds to as layers come; sizes: the most bytes of each layer of each
    prompt; in_pieces: whether layers come one by one, so that each is sent at once instead of together with the next;
    request_id: that of the attempt before, where the call is sent again.
    """

    def __init__(
        self,
        terms: CallTerms,
        prompts: Sequence[tuple[int, tuple[Range, ...]]],
        layers: int,
        form: Form,
        preparation: Preparation,
        *,
        answers: Mapping[Place, Answer],
        sizes: Sequence[int],
        encoding: str,
        in_pieces: bool,
        request_id: str | None = None,
    ) -> None:
        self.request_id = request_id or os.urandom(16).hex()
        self._terms = terms
        self._prompts = prompts
        self._kv_heads = form.shapes.kv_heads
        self._answered_layers = 1 if terms.policy.granularity == "model" else layers
        self._preparation = preparation
        self._encoding = check_encoding(encoding)
        self._header: Header | None = Header(
            request_id=self.request_id,
            policy=terms.policy,
            encoding=self._encoding,
            layers=layers,
            query_heads=form.shapes.query_heads,
            kv_heads=form.shapes.kv_heads,
            head_dim=form.shapes.head_dim,
            caller_scores=form.caller_scores,
            largest_layer_bytes=max(sizes),
            total_bytes=sum(sizes),
            prompts=tuple(Prompt(tokens, pinned) for tokens, pinned in prompts),
            rope=terms.rope,
            outputs=tuple(terms.outputs),
        )
        self._layer_by_layer = in_pieces or sum(sizes) > tensors.CHUNK_BYTES
        self._descriptors: list[Descriptor] = []  # of the message that is being filled, as are the next two
        self._chunks: list[Any] = []
        self._filled = 0
        self._described = 0
        self._crc = 0
        self.sent_bytes = 0
        self._answers = answers
        self._selected: dict[Place, LayerSelection] = {}
        self._summary: Summary | None = None

    def messages(self, work: Work) -> Iterator[Any]:
        """The messages that send a work, as far as they are full; of a stream, all of them.

        Computes what the work asks for when the first is taken; raises InvalidInputError.
        All tensors of a work are described before their bytes, since a layer leaves when nothing described is missing;
        and no layer begins in the message that ends another (unless the call is small), since a service that is short of
        room gives it to whoever holds no unfinished layer.
        """
        numbered = list(enumerate(work.pieces(self._preparation), self._described))
        self._described += len(numbered)
        for number, piece in numbered:
            self._descriptors.append(
                Descriptor(
                    id=number,
                    prompt=work.prompt,
                    layer=work.layer,
                    role=piece.role,
                    dtype=piece.dtype,
                    dims=tuple(piece.array.shape),
                    layout=piece.layout,
                    start=piece.start,
                    count=piece.count,
                    byte_length=piece.array.nbytes,
                )
            )
        for number, piece in numbered:
            for offset, part in tensors.slices(piece.array):
                if self._filled and self._filled + part.nbytes > tensors.CHUNK_BYTES:
                    yield self._message()
                self._crc = tensors.checksum(part, self._crc)
                self._chunks.append(messages.write_chunk(number, offset, part))
                self._filled += part.nbytes
        if self._layer_by_layer and (self._descriptors or self._chunks):
            yield self._message()

    def end(self) -> Any:
        """The last message: what is left, and the end with its counts and checksum."""
        return self._message(End(self._described, self.sent_bytes + self._filled, self._crc))

    def fold(self, response: Any) -> list[LayerSelection]:
        """Takes in an answer's message; the layers it brought, in the caller's kind.

        Raises InternalError where it is not the answer to this call.
        """
        policy = self._terms.policy
        layers = [self._checked(messages.read_layer(layer, policy=policy)) for layer in response.layers]
        for selection in layers:
            self._selected[selection.prompt, selection.layer] = selection
        if response.HasField("summary"):
            self._summary = messages.read_summary(response.summary)
        return layers

    def close(self) -> None:
        """Says that no answer follows; raises InternalError unless all of it came: never an answer in part."""
        missing = self._answered_layers * len(self._prompts) - len(self._selected)
        if missing or self._summary is None:
            each = "prompts" if self._terms.policy.granularity == "model" else "layers"
            what = f"{missing} {each}" if missing else "its summary"
            raise InternalError(f"the service ended its answer without {what}", request_id=self.request_id)

    def summary(self, *, seconds: Mapping[str, float], attempts: int = 1) -> Summary:
        """What the call took: our own phases beside the service's. `attempts`: how often it was sent, in all."""
        theirs = self._summary or Summary()
        return replace(
            theirs,
            request_id=self.request_id,
            sent_bytes=self.sent_bytes,
            encoding=self._encoding,
            attempts=attempts,
            seconds={**self._preparation.seconds, **theirs.seconds, **seconds},
        )

    def selections(self, summary: Summary) -> list[Selection]:
        """One Selection a prompt, after `close`."""
        return [
            Selection(tuple(self._selected[prompt, layer] for layer in range(self._answered_layers)), summary)
            for prompt in range(len(self._prompts))
        ]

    def _message(self, end: End | None = None) -> Any:
        """The message that is being filled, and an empty one in its place."""
        message = messages.write_request(header=self._header, descriptors=self._descriptors, chunks=self._chunks, end=end)
        self._header, self._descriptors, self._chunks = None, [], []
        self.sent_bytes += self._filled
        self._filled = 0
        return message

    def _checked(self, selection: LayerSelection) -> LayerSelection:
        """In the caller's kind, past the fence: for this call's prompt, length, KV heads and policy, not answered before, and
        with the outputs asked for, no other.
        """
        place = (selection.prompt, selection.layer)
        ours = 0 <= selection.prompt < len(self._prompts) and 0 <= selection.layer < self._answered_layers
        if not ours or place in self._selected or place not in self._answers:
            message = f"the service answered layer {selection.layer} of prompt {selection.prompt}, which was not asked for"
            raise InternalError(message, request_id=self.request_id)
        tokens, fingerprint = self._prompts[selection.prompt][0], self._terms.policy.fingerprint
        if (selection.num_tokens, selection.fingerprint) != (tokens, fingerprint):
            message = (
                f"the service answered for {selection.num_tokens} tokens and policy {selection.fingerprint}; "
                f"asked were {tokens} tokens and policy {fingerprint}"
            )
            raise InternalError(message, request_id=self.request_id)
        if selection.granularity == "head" and len(selection.indices) != self._kv_heads:
            message = f"the service answered for {len(selection.indices)} KV heads; asked was for {self._kv_heads}"
            raise InternalError(message, request_id=self.request_id)
        if set(selection.outputs) != set(self._terms.outputs):
            given, asked = (", ".join(sorted(each)) or "nothing" for each in (selection.outputs, self._terms.outputs))
            message = f"the service answered with {given} besides the tokens; asked was for {asked}"
            raise InternalError(message, request_id=self.request_id)
        answer, indices = self._answers[place], selection.indices
        kind = [answer(row) for row in indices] if isinstance(indices, list) else answer(indices)
        outputs = {name: answer(selection.outputs[name]) for name in self._terms.outputs}
        return replace(selection, indices=kind, outputs=outputs)


@dataclass(frozen=True, slots=True)
class Selecting:
    """A call all of whose layers are there: `select()`.

    terms, inputs: what was asked of which prompts; batched: whether they came as a list; make: another sending of the
    call, by its request id.
    """

    call: Call
    works: tuple[Work, ...]
    terms: CallTerms
    inputs: tuple[PromptInputs, ...]
    batched: bool
    make: Callable[[str], Call]

    def again(self) -> "Selecting":
        """The same, to be sent once more: every array is read anew."""
        return replace(self, call=self.make(self.call.request_id))

    def requests(self) -> Iterator[Any]:
        """All its messages; each layer is prepared when its turn comes. Raises InvalidInputError."""
        for work in self.works:
            yield from self.call.messages(work)
        yield self.call.end()

    def result(self, *, seconds: float, attempts: int = 1) -> Selection | list[Selection]:
        """What `select()` returns, once all answers are folded; `seconds`: the call's length, all attempts together."""
        self.call.close()
        selections = self.call.selections(self.call.summary(seconds={"total": seconds}, attempts=attempts))
        return selections if self.batched else selections[0]

    def instead(self, choice: str, *, seconds: float, attempts: int) -> Selection | list[Selection]:
        """What `select()` returns where the service did not answer; `choice`: "local" or "keep_all"."""
        layers = instead(choice, self.terms, unanswered(self.inputs))
        summary = fallen_back(self.call.summary(seconds={"total": seconds}, attempts=attempts), choice)
        selections = [
            Selection(tuple(layer for layer in layers if layer.prompt == prompt), summary) for prompt in range(len(self.inputs))
        ]
        return selections if self.batched else selections[0]


def fallen_back(summary: Summary, choice: str) -> Summary:
    """The summary of a call that was answered here."""
    return replace(summary, where=WHERE[choice], transport="in_process")


def selecting(given: Mapping[str, Any], *, terms: CallTerms, pinned: Any, encoding: str) -> Selecting:
    """The call for all that a caller handed to `select()`; raises InvalidInputError before anything is sent."""
    check_encoding(encoding)
    inputs, batched = prompts_of(given, terms=terms, pinned=pinned)
    prompts = [(prompt.tokens, prompt.pinned) for prompt in inputs]
    layers = len(inputs[0].layers)
    first = inputs[0].layers[0]
    form = Form.of(first.arrays, first.shapes)
    preparation = preparation_for(terms, prompts, layers, on_torch=first.on_torch, caller_scores=form.caller_scores)
    answers: dict[Place, Answer] = {}
    works, sizes = [], []
    for prompt, one in enumerate(inputs):
        for layer, own in enumerate(one.layers):
            if own.on_torch is not first.on_torch:
                raise invalid("keys", "arrays of two kinds", "arrays of one kind", reason=Reason.BAD_SHAPE)
            sizes.append(preparation.layer_bytes(Form.of(own.arrays, own.shapes), prompt, layer))
            part = Part(0, own.arrays, own.ready)
            roles = preparation.ahead(form.dtypes, prompt, layer)
            works.append(Work(prompt, layer, (part,) if roles else (), roles, (part,) if preparation.computes else ()))
            answers[prompt, layer] = own.answer

    def make(request_id: str | None = None) -> Call:
        return Call(
            terms,
            prompts,
            layers,
            form,
            preparation,
            answers=answers,
            sizes=sizes,
            encoding=encoding,
            in_pieces=False,
            request_id=request_id,
        )

    return Selecting(make(), tuple(works), terms, tuple(inputs), batched, make)


def streaming(feed: Feed, *, encoding: str, request_id: str | None = None) -> Call:
    """The call for a stream whose feed knows enough to state its sizes; `request_id`: of the attempt before, if any."""
    if feed.form is None or feed.preparation is None:
        raise RuntimeError("a stream is opened when its feed knows the form of its layers")
    places = [(prompt, layer) for prompt in range(len(feed.prompts)) for layer in range(feed.layers)]
    sizes = [feed.preparation.layer_bytes(feed.form, *place) for place in places]
    return Call(
        feed.terms,
        feed.prompts,
        feed.layers,
        feed.form,
        feed.preparation,
        answers=feed.answers,
        sizes=sizes,
        encoding=encoding,
        in_pieces=True,
        request_id=request_id,
    )


def check_encoding(encoding: str) -> str:
    """The encoding by its name on the wire, "auto" being exact; InvalidInputError naming those there are."""
    if encoding == "auto":
        return "exact"
    if encoding not in ENCODINGS:
        raise unknown_name("encoding", encoding, ("auto", *ENCODINGS))
    return encoding
