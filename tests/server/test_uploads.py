"""Uploads as a state machine: valid steps in any order, a violation now and then, against a model of what was sent.

A violation ends its own call with a typed error; whatever happens, every byte of room and every buffer comes back.
"""

import contextlib
from typing import Any

import google_crc32c
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from graphkv_proto import v1 as pb
from graphkv_server.engine.work import Scored
from graphkv_testing.assembling import AssemblerCall
from graphkv_testing.forms import POLICIES, call_of
from graphkv_testing.raw import DTYPES, RawCall
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graphkv.candidates import Candidates
from graphkv.layer import Layer
from graphkv.terms.errors import GraphKVError, InvalidInputError

FIELDS = {
    (Layer, pb.ROLE_KEYS): "keys",
    (Layer, pb.ROLE_QUERIES): "queries",
    (Scored, pb.ROLE_CANDIDATE_IDS): "ids",
    (Scored, pb.ROLE_SCORES): "all_scores",
    (Scored, pb.ROLE_KEYS): "keys",
    (Candidates, pb.ROLE_ROW_FACTS): "facts",
}


class Uploads(RuleBasedStateMachine):
    """One caller after another: valid steps in any order, a violation now and then, which ends the call alone."""

    @initialize()
    def start(self) -> None:
        self.call: AssemblerCall | None = None
        self.calls = 0

    @precondition(lambda self: self.call is None)
    @rule(layers=st.integers(1, 3), tokens=st.integers(3, 23), name=st.sampled_from(["a layer", "a model"]), data=st.data())
    def begin_narrowed(self, layers: int, tokens: int, name: str, data: st.DataObject) -> None:
        """Candidates beside the scores of all tokens, which come in ranges."""
        self.calls += 1
        self.sent = call_of(POLICIES[name], "narrowed", layers=layers, tokens=tokens, window=2, seed=self.calls)
        self.todo = []
        for layer, role, array, count in self.sent.tensors:
            cut = data.draw(st.integers(1, tokens - 1)) if role == pb.ROLE_SCORES else 0
            for start, stop in ((0, cut), (cut, tokens)) if cut else ():
                self.todo.append((layer, role, array[:, start:stop], start, stop - start, False))
            if not cut:
                self.todo.append((layer, role, array, 0, count, False))
        self.open_call()

    @precondition(lambda self: self.call is None)
    @rule(layers=st.integers(1, 3), heads=st.integers(1, 3), group=st.integers(1, 2), tokens=st.integers(1, 19), data=st.data())
    def begin(self, layers: int, heads: int, group: int, tokens: int, data: st.DataObject) -> None:
        self.calls += 1
        window = min(4, tokens)
        self.sent = RawCall(
            layers=layers, kv_heads=heads, query_heads=heads * group, tokens=tokens, head_dim=3, window=window, seed=self.calls
        )
        if data.draw(st.booleans()):
            self.sent.header.policy.budget_allocation = pb.BUDGET_ALLOCATION_CAKE
        self.todo: list[tuple[int, int, Any, int, int, bool]] = []  # layer, role, array, start, count, tokens first
        for layer in range(layers):
            cuts = sorted(data.draw(st.sets(st.integers(1, max(1, tokens - 1)), max_size=2))) if tokens > 1 else []
            for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
                turned = data.draw(st.booleans())
                part = self.sent.keys[layer][:, start:stop]
                array = part.swapaxes(0, 1) if turned else part
                self.todo.append((layer, pb.ROLE_KEYS, array, start, stop - start, turned))
            self.todo.append((layer, pb.ROLE_QUERIES, self.sent.queries[layer], 0, 0, False))
        self.open_call()

    def open_call(self) -> None:
        self.open: dict[int, tuple[int, bytes]] = {}  # by descriptor: bytes that went, all of them
        self.number = self.crc = self.total = 0
        self.call = AssemblerCall(self.sent.header)

    @precondition(lambda self: self.call is not None and self.todo)
    @rule(data=st.data())
    def describe(self, data: st.DataObject) -> None:
        layer, role, array, start, count, turned = self.todo.pop(data.draw(st.integers(0, len(self.todo) - 1)))
        content = np.ascontiguousarray(array).tobytes()
        descriptor = pb.Descriptor(
            id=self.number,
            layer=layer,
            role=role,
            dtype=DTYPES[str(array.dtype)],
            dims=array.shape,
            layout=pb.LAYOUT_NHD if turned else pb.LAYOUT_HND,
            start=start,
            count=count,
            byte_length=len(content),
        )
        self.call.take(pb.SelectRequest(descriptors=[descriptor]))
        self.open[self.number] = (0, content)
        self.last = descriptor
        self.number += 1

    @precondition(lambda self: self.call is not None and self.open)
    @rule(data=st.data())
    def chunk(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        sent, content = self.open[number]
        part = content[sent : sent + data.draw(st.integers(1, len(content) - sent))]
        self.call.take(pb.SelectRequest(chunks=[pb.Chunk(descriptor=number, offset=sent, data=part)]))
        self.crc, self.total = google_crc32c.extend(self.crc, part), self.total + len(part)
        if sent + len(part) == len(content):
            del self.open[number]
        else:
            self.open[number] = (sent + len(part), content)

    @precondition(lambda self: self.call is not None)
    @rule(wrong=st.sampled_from(["nothing", "nothing", "bytes", "descriptors", "checksum"]))
    def end(self, wrong: str) -> None:
        end = pb.End(
            descriptors=self.number + (wrong == "descriptors"),
            bytes=self.total + (wrong == "bytes"),
            crc32c=self.crc ^ (wrong == "checksum"),
        )
        complete = not self.todo and not self.open
        kept_whole = self.sent.tokens <= 7
        if complete and wrong == "nothing":
            self.call.take(pb.SelectRequest(end=end))
            self.check_layers()
            with pytest.raises(InvalidInputError):
                self.call.take(pb.SelectRequest())
        else:
            reasons = {"CHECKSUM"} if complete and wrong == "checksum" else {"INCOMPLETE"}
            if kept_whole and self.number == 0 and wrong in ("nothing", "checksum"):
                reasons = {"CHECKSUM"} if wrong == "checksum" else set()
            if reasons:
                self.violate(pb.SelectRequest(end=end), reasons)
                return
            self.call.take(pb.SelectRequest(end=end))
        self.leave()

    @precondition(lambda self: self.call is not None and self.open)
    @rule(data=st.data(), kind=st.sampled_from(["ahead", "again", "too much", "empty", "unknown", "negative"]))
    def bad_chunk(self, data: st.DataObject, kind: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        sent, content = self.open[number]
        rest = content[sent:]
        chunk = {
            "ahead": pb.Chunk(descriptor=number, offset=sent + 1, data=rest[:1]),
            "again": pb.Chunk(descriptor=number, offset=sent - 1, data=rest[:1]),
            "too much": pb.Chunk(descriptor=number, offset=sent, data=rest + b"x"),
            "empty": pb.Chunk(descriptor=number, offset=sent),
            "unknown": pb.Chunk(descriptor=self.number + 1, offset=0, data=b"x"),
            "negative": pb.Chunk(descriptor=-1, offset=0, data=b"x"),
        }[kind]
        self.violate(pb.SelectRequest(chunks=[chunk]), {"BAD_LAYOUT"})

    @precondition(lambda self: self.call is not None and self.number)
    @rule(
        field=st.sampled_from(["id", "layer", "prompt", "start", "count", "byte_length", "dims", "role", "dtype"]),
        value=st.sampled_from([-(2**62), -1, 0, 1, 3, 2**31, 2**62, 2**63 - 1]),
    )
    def bent_descriptor(self, field: str, value: int) -> None:
        """The last descriptor again, with one field set otherwise: refused, whatever it says."""
        descriptor = pb.Descriptor.FromString(self.last.SerializeToString())
        descriptor.id = self.number
        if field == "dims":
            descriptor.dims[0] = value
        elif field in ("role", "dtype"):
            setattr(descriptor, field, value % 14)
        else:
            setattr(descriptor, field, value)
        with contextlib.suppress(GraphKVError):
            self.call.take(pb.SelectRequest(descriptors=[descriptor]))
        self.leave()

    @precondition(lambda self: self.call is not None)
    @rule()
    def vanish(self) -> None:
        if not self.call.assembler.ended:
            with pytest.raises(InvalidInputError) as caught:
                self.call.assembler.closed()
            assert caught.value.reason == "INCOMPLETE"
        self.leave()

    @invariant()
    def layers_leave_whole_and_room_is_taken_for_open_ones_only(self) -> None:
        if getattr(self, "call", None) is not None:
            admission = self.call.admission
            assert (admission.bytes_in_flight > 0) == (admission.pool.lent_bytes > 0)

    def violate(self, message: pb.SelectRequest, reasons: set[str]) -> None:
        with pytest.raises(GraphKVError) as caught:
            self.call.take(message)
        assert caught.value.reason in reasons
        assert caught.value.argument
        self.leave()

    def check_layers(self) -> None:
        assert len(self.call.sink.layers) == self.sent.layers
        for (_, layer), work in self.call.sink.layers.items():
            for own, role, array, _ in self.sent.tensors:
                if own == layer:
                    assert torch.equal(getattr(work, FIELDS[type(work), role]), torch.from_numpy(array))

    def leave(self) -> None:
        self.call.close()
        self.call = None

    def teardown(self) -> None:
        if getattr(self, "call", None) is not None:
            self.leave()


TestUploads = Uploads.TestCase
TestUploads.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
