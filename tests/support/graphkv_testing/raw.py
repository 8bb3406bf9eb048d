"""Select calls as raw protobuf, without the SDK: a valid small call that a test can bend in any way, and what came back."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from graphkv_proto import v1 as pb

from graphkv import Graph, Policy, select

__all__ = ["DTYPES", "SELECT", "Outcome", "RawCall", "assert_good", "call", "collect", "raw_policy"]

SELECT = "/graphkv.v1.Compression/Select"
DTYPES = {
    "float32": pb.DTYPE_F32,
    "float16": pb.DTYPE_F16,
    "int32": pb.DTYPE_I32,
    "int64": pb.DTYPE_I64,
    "float64": pb.DTYPE_F64,
}


def raw_policy(budget: int = 7, *, window: int = 4, pre_rope: bool = False) -> pb.Policy:
    """SnapKV with the default graph, every field stated."""
    return pb.Policy(
        budget_tokens=budget,
        scorer=pb.SCORER_SNAPKV,
        budget_allocation=pb.BUDGET_ALLOCATION_UNIFORM,
        window=window,
        pooling=pb.POOLING_AVG,
        granularity=pb.GRANULARITY_HEAD,
        combine=pb.COMBINE_MEAN,
        graph=pb.Graph(
            source_ratio=0.3,
            neighbors_auto=pb.NeighborsAuto(),
            threshold=0.5,
            candidates=4.0,
            similarity=pb.SIMILARITY_PRE_ROPE if pre_rope else pb.SIMILARITY_POST_ROPE,
            rounds=1,
            strength=1.0,
            signal=pb.SIGNAL_DECAY,
            update=pb.UPDATE_PRODUCT,
        ),
    )


@dataclass
class RawCall:
    """A valid call of the whole form: keys [L, Hkv, n, d] and queries [L, Hq, w, d] of one prompt, float32.

    `tensors` holds (layer, role, array, count) in the order they are sent; change anything before `messages()`.
    """

    layers: int = 2
    kv_heads: int = 2
    query_heads: int = 4
    tokens: int = 23
    head_dim: int = 8
    window: int = 4
    seed: int = 0
    header: Any = None
    tensors: list[tuple[int, int, Any, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        self.keys = random.standard_normal((self.layers, self.kv_heads, self.tokens, self.head_dim), np.float32)
        self.queries = random.standard_normal((self.layers, self.query_heads, self.window, self.head_dim), np.float32)
        for layer in range(self.layers):
            self.tensors.append((layer, pb.ROLE_KEYS, self.keys[layer], self.tokens))
            self.tensors.append((layer, pb.ROLE_QUERIES, self.queries[layer], 0))
        largest = self.keys[0].nbytes + self.queries[0].nbytes
        self.header = pb.Header(
            minor=0,
            request_id="raw",
            policy=raw_policy(window=self.window),
            encoding=pb.ENCODING_EXACT,
            layers=self.layers,
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            importance=pb.IMPORTANCE_SCORER,
            largest_layer_bytes=largest,
            total_bytes=largest * self.layers,
            prompts=[pb.Prompt(tokens=self.tokens)],
        )

    def messages(self, *, chunk: int = 2**20) -> list[Any]:
        """The header, then a message a layer with its descriptors, messages of chunks, and the end."""
        messages, crc, total, number = [pb.SelectRequest(header=self.header)], 0, 0, 0
        for layer in range(self.layers):
            described = pb.SelectRequest()
            chunks = []
            for place, role, array, count in self.tensors:
                if place != layer:
                    continue
                data = np.ascontiguousarray(array).tobytes()
                described.descriptors.add(
                    id=number,
                    prompt=0,
                    layer=layer,
                    role=role,
                    dtype=DTYPES[str(array.dtype)],
                    dims=array.shape,
                    layout=pb.LAYOUT_HND,
                    count=count,
                    byte_length=len(data),
                )
                for start in range(0, len(data), chunk):
                    part = data[start : start + chunk]
                    chunks.append(pb.SelectRequest(chunks=[pb.Chunk(descriptor=number, offset=start, data=part)]))
                    crc = google_crc32c.extend(crc, part)
                    total += len(part)
                number += 1
            messages += [described, *chunks]
        messages.append(pb.SelectRequest(end=pb.End(descriptors=number, bytes=total, crc32c=crc)))
        return messages

    def expected(self) -> list[Any]:
        """The library's own answer to the unbent call: indices by layer."""
        policy = Policy(budget=7, window=self.window, graph=Graph(neighbors="auto", threshold=0.5))
        answer = select(self.keys, queries=self.queries, policy=policy)
        return answer.indices  # type: ignore[union-attr]


@dataclass
class Outcome:
    """What a call came to: its answers, and its status with details where it failed."""

    answers: dict[tuple[int, int], Any]
    summary: Any
    code: Any
    message: str
    reason: str
    fields: list[str]
    info: dict[str, str]
    retry_after: float | None

    def indices(self, layer: int, prompt: int = 0) -> Any:
        """int32 [Hkv, B]."""
        answer = self.answers[prompt, layer]
        return np.frombuffer(answer.values, "<i4").reshape(answer.rows, -1)


def call(address: str, messages: Iterable[Any], *, timeout: float | None = 30.0, channel: Any = None) -> Outcome:
    """Sends the messages and half-closes; returns what came back, whatever it is."""
    own = channel or grpc.insecure_channel(address)
    try:
        method = own.stream_stream(
            SELECT, request_serializer=pb.SelectRequest.SerializeToString, response_deserializer=pb.SelectResponse.FromString
        )
        return collect(method(iter(messages), timeout=timeout))
    finally:
        if channel is None:
            own.close()


def assert_good(address: str, sent: RawCall | None = None, **options: Any) -> Outcome:
    """A good caller's answer is the library's."""
    sent = sent or RawCall(seed=99)
    got = call(address, sent.messages(**options))
    assert got.code == grpc.StatusCode.OK, got.message
    assert got.summary is not None
    expected = sent.expected()
    for layer in range(sent.layers):
        np.testing.assert_array_equal(got.indices(layer), expected[layer])
    return got


def collect(responses: Iterator[Any]) -> Outcome:
    """Reads a call to its end."""
    outcome = Outcome({}, None, grpc.StatusCode.OK, "", "", [], {}, None)
    try:
        for response in responses:
            for answer in response.layers:
                outcome.answers[answer.prompt, answer.layer] = answer
            if response.HasField("summary"):
                outcome.summary = response.summary
    except grpc.RpcError as error:
        _read_status(outcome, error)
    return outcome


def _read_status(outcome: Outcome, error: Any) -> None:
    outcome.code, outcome.message = error.code(), error.details()
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                outcome.reason, outcome.info = info.reason, dict(info.metadata)
            elif detail.Unpack(bad):
                outcome.fields = [violation.field for violation in bad.field_violations]
            elif detail.Unpack(retry):
                outcome.retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
