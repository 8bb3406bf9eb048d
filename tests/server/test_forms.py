"""A real server process and every form of a layer, budget and answer, in raw protobuf: the answers are the library's."""

from collections.abc import Iterator

import google_crc32c
import grpc
import numpy as np
import pytest
from graphkv_proto import v1 as pb
from graphkv_proto.messages import read_layer
from graphkv_testing.forms import POLICIES, assert_library, call_of, forms_of, library, outputs_of
from graphkv_testing.process import Server, serve
from graphkv_testing.raw import call

CASES = [(name, form) for name, policy in POLICIES.items() for form in forms_of(policy)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--max-bytes-in-flight", "1MiB", "--stall-timeout", "5", "--device", "cpu") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(server: Server) -> Iterator[None]:
    yield
    assert server.settled(), server.metrics()


@pytest.mark.parametrize(("name", "form"), CASES, ids=[" - ".join(case) for case in CASES])
def test_an_answer_is_the_librarys(server: Server, name: str, form: str) -> None:
    policy = POLICIES[name]
    for outputs in ((), outputs_of(policy)):
        sent = call_of(policy, form, outputs=outputs, layers=3, window=2, seed=4)
        got = call(server.address, sent.messages(chunk=100))
        assert_library(got, library(policy, sent, outputs), policy)


def test_scores_of_all_tokens_may_come_in_ranges_before_or_after_the_candidates(server: Server) -> None:
    policy = POLICIES["a layer"]
    sent = call_of(policy, "narrowed", window=2, seed=5)
    ranges = []
    for layer, role, array, count in sent.tensors:
        parts = [(array, count, 0)]
        if role == pb.ROLE_SCORES:
            parts = [(array[:, start:stop], stop - start, start) for start, stop in ((9, 23), (0, 1), (1, 9))]
        ranges += [(layer, role, *part) for part in parts]
    for order in (ranges, ranges[::-1]):
        sent.tensors = [entry[:4] for entry in order]
        messages = sent.messages()
        starts = {layer: [entry[4] for entry in order if entry[0] == layer] for layer in range(2)}
        for message in messages:
            for descriptor in message.descriptors:
                descriptor.start = starts[descriptor.layer].pop(0)
        assert_library(call(server.address, messages), library(policy, sent), policy)


def test_several_prompts_are_each_answered_for_themselves(server: Server) -> None:
    """Layers of both prompts come mixed: only those of one prompt belong together."""
    for name in ("a model", "cake"):
        policy = POLICIES[name]
        first, second = (call_of(policy, "whole", window=2, seed=seed) for seed in (6, 7))
        whole = pb.SelectRequest()
        for prompt, sent in enumerate((first, second)):
            for message in sent.messages():
                for descriptor in message.descriptors:
                    descriptor.prompt, descriptor.id = prompt, 2 * descriptor.id + prompt
                for chunk in message.chunks:
                    chunk.descriptor = 2 * chunk.descriptor + prompt
                whole.descriptors.extend(message.descriptors)
                whole.chunks.extend(message.chunks)
        whole.header.CopyFrom(first.header)
        whole.header.prompts.append(whole.header.prompts[0])
        whole.header.total_bytes *= 2
        chunks = sorted(whole.chunks, key=lambda chunk: chunk.descriptor)
        crc = 0
        for chunk in chunks:
            crc = google_crc32c.extend(crc, chunk.data)
        end = pb.End(descriptors=len(whole.descriptors), bytes=sum(len(chunk.data) for chunk in chunks), crc32c=crc)
        request = pb.SelectRequest(header=whole.header, descriptors=whole.descriptors, chunks=chunks, end=end)
        got = call(server.address, [request])
        assert got.code == grpc.StatusCode.OK, got.message
        for prompt, sent in enumerate((first, second)):
            for layer in library(policy, sent).layers:
                answer = read_layer(got.answers.pop((prompt, layer.layer)), policy=policy)
                np.testing.assert_array_equal(answer.indices, layer.indices)
        assert not got.answers


def test_kept_tokens_are_counted_where_heads_layers_or_pages_share_them(server: Server) -> None:
    """Two layers of two KV heads: every head that keeps a token counts it."""
    for name, kept in {"heads": 28, "a layer": 28, "a model": 28, "adaptive heads": 28, "pages of a model": 4 * 7}.items():
        policy = POLICIES[name]
        sent = call_of(policy, "whole", window=2, seed=8)
        before = server.metric("graphkv_kept_tokens_total")
        assert_library(call(server.address, sent.messages()), library(policy, sent), policy)
        assert server.settled()
        assert server.metric("graphkv_kept_tokens_total") - before == kept, name
