"""Messages of one call become whole layers in pooled buffers: counts, order, sizes and the checksum are checked here.

Trusts nothing that arrives; every violation is a typed error that names what, where, expected and got. A layer goes to
the engine the moment it is whole, while later ones still arrive. Only `End` says that a call is complete: a client that
was killed looks like one that finished. Knows protobuf messages but no gRPC, so that tests and fuzzers can drive it.

A caller describes all tensors of a layer before the last byte of those that are needed: a layer is whole, and leaves, at
the end of the message after which nothing described or needed is missing. Where the policy needs all layers of a prompt
they wait for each other in the engine's job, so room for all of the call is taken before the first comes: no two calls can
hold what the other waits for.
"""

from typing import Any, Protocol

from graphkv_proto import messages, tensors
from graphkv_proto.messages import Descriptor, End, Header

from graphkv.budgets import LayerPlan, plan_layers
from graphkv.terms.errors import InvalidInputError, Reason, UnavailableError, invalid
from graphkv.terms.needs import check_source, query_rows
from graphkv.terms.shapes import Shapes
from graphkv_server.admission import Lease, Reservation
from graphkv_server.arriving import ArrivingLayer, Piece, empty_layer, misplaced
from graphkv_server.engine.work import Work
from graphkv_server.rooms import working_bytes

__all__ = ["MAX_DESCRIPTORS", "MAX_LAYERS", "MAX_OPEN_LAYERS", "MAX_PINNED", "Assembler", "Sink"]

MAX_LAYERS = 2**14
"""Layers of all prompts of a call together."""
MAX_DESCRIPTORS = 2**17
"""Descriptors of a call together: tensors, and ranges of their tokens."""
MAX_OPEN_LAYERS = 2**12
"""Layers of a call that are described and not whole yet. A prefill in chunks has all layers of a model open at once."""
MAX_PINNED = 2**20
"""Pinned ranges of all prompts together, times the layers that are planned with them."""

Place = tuple[int, int]
"""(prompt, layer)."""


class Sink(Protocol):
    """Where whole layers go: the engine's job."""

    def submit(self, work: Work, lease: Lease, *, prompt: int, size: int, layers: int) -> None:
        """Takes a layer and, with it, the duty to give its lease back; it is answered when `layers` of its prompt are here."""
        ...

    def finish(self) -> None:
        """No more layers will come."""
        ...


class Assembler:
    """One call. Construction checks the header: raises InvalidInputError before a byte is reserved."""

    def __init__(self, header: Header, reservation: Reservation, sink: Sink) -> None:
        self._header = header
        self._reservation = reservation
        self._sink = sink
        self._shapes, self._plans, self._room = [], [], []  # by prompt
        self._check_sizes()
        for place, prompt in enumerate(header.prompts):
            shapes, plans = self._planned(prompt.tokens, prompt.pinned)
            self._shapes.append(shapes)
            self._plans.append(plans)
            self._room.append(self._room_for(place, shapes, plans))
        self._needs_all = header.policy.needs_all_layers
        if self._needs_all:
            reservation.check_fits("total_bytes", header.layers * sum(self._room), "for all layers of the call at once")
        self._open: dict[Place, ArrivingLayer] = {}
        self._left: set[Place] = set()  # layers that went to the sink
        self._pieces: dict[int, Piece] = {}  # of open layers
        self._descriptors: dict[int, Place] = {}  # of all layers so far
        self._described = 0  # bytes
        self._ahead: Lease | None = None  # room for the next layer
        self._reserved: dict[Place, Lease] | None = None  # room for all that have not come, where they are needed together
        self._crc = 0
        self._ended = False
        self.received = 0  # bytes in chunks

    @property
    def ended(self) -> bool:
        """Whether End came and all was right."""
        return self._ended

    async def ready(self) -> None:
        """Before the next message is read: where room is scarce, waits for that of the next layer.

        A call that waits so holds no message. Where there is room none is taken yet: it may be long until the layer comes.
        """
        more = not self._ended and len(self._left) < self._header.layers * len(self._plans)
        if not more or self._open:
            return
        if self._needs_all:
            if self._reserved is None and self._reservation.scarce(self._header.layers * sum(self._room)):
                await self._reserve()
        elif self._ahead is None and self._reservation.scarce(max(self._room)):
            (self._ahead,) = await self._reservation.lease(max(self._room))

    async def take(self, message: Any) -> None:
        """The descriptors, chunks and end of one `graphkv.v1.SelectRequest` (its header was read before).

        May wait for room for a new layer, and so holds up the caller. Raises GraphKVError.
        """
        if self._ended:
            raise misplaced("end", "the request", "followed by another message", "the last one")
        touched: dict[Place, None] = {}  # in order; no other layer can have become whole
        if message.descriptors:
            descriptors = [self._checked(messages.read_descriptor(each)) for each in message.descriptors]
            touched.update(dict.fromkeys((each.prompt, each.layer) for each in descriptors))
            await self._describe(descriptors, list(touched))
        for chunk in message.chunks:
            layer = self._write(chunk.descriptor, chunk.offset, chunk.data)
            touched[layer.prompt, layer.plan.layer] = None
        for place in touched:
            layer = self._open[place]
            if layer.whole():
                self._release(place, layer)
        if message.HasField("end"):
            await self._end(messages.read_end(message.end))

    def closed(self) -> None:
        """The stream has no more messages: the call is complete, or InvalidInputError (INCOMPLETE) says what is missing."""
        if not self._ended:
            message = f"the request ended without `end`{self._first_missing()}"
            raise InvalidInputError(message, argument="end", reason=Reason.INCOMPLETE)
        self._sink.finish()

    def _check_sizes(self) -> None:
        header = self._header
        if header.layers * len(header.prompts) > MAX_LAYERS:
            raise invalid("layers", header.layers, f"at most {MAX_LAYERS} for all prompts together", reason=Reason.TOO_LARGE)
        ranges = 0
        for place, prompt in enumerate(header.prompts):
            ranges += len(prompt.pinned)
            if ranges * header.layers > MAX_PINNED:
                most = MAX_PINNED // header.layers
                allowed = f"at most {most} ranges, of all prompts together, with {header.layers} layers"
                raise invalid(f"prompts[{place}].pinned", f"range {ranges}", allowed, reason=Reason.TOO_LARGE)
        self._reservation.check_fits("largest_layer_bytes", header.largest_layer_bytes)
        most = header.largest_layer_bytes * header.layers * len(header.prompts)
        if header.total_bytes > most:
            allowed = f"at most {most}, the largest layer times the number of layers"
            raise invalid("total_bytes", header.total_bytes, allowed, reason=Reason.TOO_LARGE)
        if header.total_bytes < header.largest_layer_bytes:
            allowed = f"at least largest_layer_bytes, {header.largest_layer_bytes}"
            raise invalid("total_bytes", header.total_bytes, allowed, reason=Reason.BAD_SHAPE)

    def _planned(self, tokens: int, pinned: Any) -> tuple[Shapes, tuple[LayerPlan, ...]]:
        header = self._header
        if header.caller_scores:  # which not every policy takes
            check_source(header.policy, ["scores"], rows=0, num_tokens=tokens)
        plans = plan_layers(
            header.policy,
            num_tokens=tokens,
            num_layers=header.layers,
            pinned=pinned,
            caller_scores=header.caller_scores,
            outputs=header.outputs,
        )
        heads = header.query_heads
        rows = query_rows(header.policy, tokens) or 0 if heads else 0
        return Shapes(header.layers, header.kv_heads, tokens, header.head_dim, heads, rows), plans

    def _room_for(self, place: int, shapes: Shapes, plans: tuple[LayerPlan, ...]) -> int:
        """Bytes to lease for a layer: its tensors, or what choosing and answering takes where that is more.

        That is so with few candidates of a long prompt, with a prompt that is kept whole, and with outputs.
        """
        choosing = working_bytes(plans, shapes.kv_heads)
        self._reservation.check_fits(f"prompts[{place}].tokens", choosing)
        return max(self._header.largest_layer_bytes, choosing)

    def _checked(self, descriptor: Descriptor) -> Descriptor:
        """The descriptor, if it may stand in this call at all; from here on its id is used and its bytes are counted."""
        where = f"layer {descriptor.layer}"
        if descriptor.id in self._descriptors:
            raise misplaced("descriptor.id", where, descriptor.id, "one that was not used before")
        if len(self._descriptors) == MAX_DESCRIPTORS:
            raise misplaced(
                "descriptors", "the request", MAX_DESCRIPTORS + 1, f"at most {MAX_DESCRIPTORS}", reason=Reason.TOO_LARGE
            )
        for name, most in (("prompt", len(self._plans)), ("layer", self._header.layers)):
            given = getattr(descriptor, name)
            if given >= most:
                raise misplaced(f"descriptor.{name}", descriptor.role, given, f"0 to {most - 1}", reason=Reason.BAD_SHAPE)
        self._reservation.check_fits("descriptor.byte_length", descriptor.byte_length)
        self._described += descriptor.byte_length
        if self._described > self._header.total_bytes:
            allowed = f"in all at most the header's total_bytes, {self._header.total_bytes}"
            raise misplaced("descriptor.byte_length", f"{descriptor.role} of {where}", descriptor.byte_length, allowed)
        if (descriptor.prompt, descriptor.layer) in self._left:
            allowed = "of a layer that is not complete yet; all its tensors are described before its last byte"
            raise misplaced("descriptor.layer", f"{descriptor.role} of {where}", descriptor.layer, allowed)
        self._descriptors[descriptor.id] = (descriptor.prompt, descriptor.layer)
        return descriptor

    async def _describe(self, descriptors: list[Descriptor], places: list[Place]) -> None:
        """Opens the layers that are new, with room for all of them at once: so a small call in one message waits once."""
        fresh = [place for place in places if place not in self._open]
        if len(self._open) + len(fresh) > MAX_OPEN_LAYERS:
            given, allowed = f"layers {len(self._open) + len(fresh)}", f"at most {MAX_OPEN_LAYERS} that are not whole yet"
            raise misplaced("descriptor.layer", "the request", given, allowed, reason=Reason.TOO_LARGE)
        for place, lease in zip(fresh, await self._leases(fresh), strict=True):
            self._open[place] = self._layer(place, lease)
        for descriptor in descriptors:
            layer = self._open[descriptor.prompt, descriptor.layer]
            self._pieces[descriptor.id] = layer.describe(descriptor)
            layer.pieces.append(descriptor.id)

    async def _leases(self, places: list[Place]) -> list[Lease]:
        """Room for these layers, all of it or none; may wait for it, or for that of the whole call."""
        if not places:
            return []
        if self._needs_all:
            reserved = self._reserved if self._reserved is not None else await self._reserve()
            return [reserved.pop(place) for place in places]
        leases = [] if self._ahead is None else [self._ahead]
        if len(leases) < len(places):
            leases += await self._reservation.lease(*(self._room[prompt] for prompt, _ in places[len(leases) :]))
        self._ahead = None
        return leases

    async def _reserve(self) -> dict[Place, Lease]:
        """Room for every layer of every prompt of the call."""
        places = [(prompt, plan.layer) for prompt, plans in enumerate(self._plans) for plan in plans]
        leases = await self._reservation.lease(*(self._room[prompt] for prompt, _ in places))
        self._reserved = dict(zip(places, leases, strict=True))
        return self._reserved

    def _layer(self, place: Place, lease: Lease) -> ArrivingLayer:
        prompt, index = place
        largest, rope = self._header.largest_layer_bytes, self._header.rope
        return ArrivingLayer(self._plans[prompt][index], self._shapes[prompt], prompt, lease, largest=largest, rope=rope)

    def _write(self, descriptor: int, offset: int, chunk: bytes) -> ArrivingLayer:
        piece = self._pieces.get(descriptor)
        if piece is None:
            if descriptor in self._descriptors:
                raise misplaced(
                    "chunk.descriptor",
                    f"layer {self._descriptors[descriptor][1]}",
                    descriptor,
                    "of a layer that is not complete yet",
                )
            raise misplaced("chunk.descriptor", "the request", descriptor, "the id of a descriptor that came before")
        piece.write(offset, chunk)
        self._crc = tensors.checksum(chunk, self._crc)
        self.received += len(chunk)
        return piece.layer

    def _release(self, place: Place, layer: ArrivingLayer) -> None:
        """Sends a whole layer to the sink."""
        work = layer.build()  # before anything is given away: it may raise
        del self._open[place]
        self._left.add(place)
        for number in layer.pieces:
            del self._pieces[number]
        self._submit(work, layer.lease, layer.prompt, layer.size)

    def _submit(self, work: Work, lease: Lease, prompt: int, size: int) -> None:
        lease.finished()
        self._sink.submit(work, lease, prompt=prompt, size=size, layers=self._header.layers if self._needs_all else 1)

    async def _end(self, end: End) -> None:
        missing = self._first_missing()
        if missing:
            raise InvalidInputError(f"the request is incomplete{missing}", argument="end", reason=Reason.INCOMPLETE)
        for argument, declared, counted in (
            ("end.descriptors", end.descriptors, len(self._descriptors)),
            ("end.bytes", end.bytes, self.received),
        ):
            if declared != counted:
                raise misplaced(argument, "the request", declared, f"{counted}, which is what came", reason=Reason.INCOMPLETE)
        if end.crc32c != self._crc:
            message = f"the checksum of the request is {self._crc:#010x}, sent was {end.crc32c:#010x}: bytes changed on the way"
            raise UnavailableError(message, reason=Reason.CHECKSUM, argument="end.crc32c")
        self._ended = True
        for prompt, plans in enumerate(self._plans):
            for plan in plans:
                if (prompt, plan.layer) not in self._left:  # kept whole, so nothing had to come
                    (lease,) = await self._leases([(prompt, plan.layer)])
                    self._left.add((prompt, plan.layer))
                    self._submit(empty_layer(plan, self._shapes[prompt]), lease, prompt, 0)
        if self._ahead is not None:
            self._ahead.give_back()

    def _first_missing(self) -> str:
        """What is missing, in words, ready to follow a sentence; empty where nothing is."""
        for layer in self._open.values():
            missing = layer.missing()
            if missing:
                return f": {missing}"
        for prompt, plans in enumerate(self._plans):
            for plan in plans:
                if (prompt, plan.layer) not in self._left and not plan.keeps_all:
                    return f": layer {plan.layer} of prompt {prompt} did not come"
        return ""
