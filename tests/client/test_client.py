"""CompressClient against a real server: equal to graphkv.select, typed errors, deadlines, threads, nothing left behind."""

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from graphkv_client import (
    ClientOptions,
    CompressClient,
    DeadlineError,
    Graph,
    GraphKVError,
    InternalError,
    InvalidInputError,
    Policy,
    Rope,
    UnavailableError,
)
from graphkv_testing.process import Server, wait_until
from graphkv_testing.stand_in import Seen, answer, end_of, stand_in

import graphkv

POLICY = Policy(50)
CAKE = Policy(50, budget_allocation="cake")


def same(given: Any, wanted: Any) -> None:
    assert [np.asarray(rows).tolist() for rows in given.indices] == [np.asarray(rows).tolist() for rows in wanted.indices]
    assert given.kept_score_ratio == wanted.kept_score_ratio
    assert given.changed == wanted.changed


def test_the_answer_is_the_librarys(client: CompressClient, prompt: dict[str, Any]) -> None:
    kept = client.select(**prompt, policy=POLICY)
    same(kept, graphkv.select(**prompt, policy=POLICY))
    assert all(isinstance(rows, np.ndarray) and rows.dtype == np.int32 and rows.flags.writeable for rows in kept.indices)
    assert kept.exact
    assert kept.summary.transport == "tcp"
    assert kept.summary.encoding == "exact"
    assert kept.summary.sent_bytes == sum(array.nbytes for array in prompt.values())
    assert {"receive", "queue", "compute", "total"} <= set(kept.summary.seconds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("policy", [POLICY, Policy(50, graph=Graph(candidates=None))], ids=["candidates", "all"])
def test_torch_of_any_dtype_and_layout(
    client: CompressClient, prompt: dict[str, Any], dtype: torch.dtype, layout: str, policy: Policy
) -> None:
    given = {role: torch.from_numpy(array).to(dtype) for role, array in prompt.items()}
    wanted = graphkv.select(**given, policy=policy)
    if layout == "NHD":
        given = {role: tensor.transpose(1, 2).contiguous() for role, tensor in given.items()}
    kept = client.select(**given, policy=policy, layout=layout)
    same(kept, wanted)
    assert all(isinstance(rows, torch.Tensor) and rows.dtype == torch.int32 for rows in kept.indices)


@pytest.mark.parametrize("kind", ["strided", "tokens first", "fp8", "bf16 of ml_dtypes", "dlpack"])
def test_numpy_as_it_lies(client: CompressClient, prompt: dict[str, Any], kind: str) -> None:
    given, layout = dict(prompt), "HND"
    if kind == "strided":
        wide = np.zeros((2, 3, 300, 32), np.float32)
        wide[:, :, :201, ::2] = prompt["keys"]
        given["keys"] = wide[:, :, :201, ::2]
    elif kind == "tokens first":
        given = {role: np.ascontiguousarray(array.swapaxes(1, 2)) for role, array in prompt.items()}
        layout = "NHD"
    elif kind in ("fp8", "bf16 of ml_dtypes"):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        dtype, like = (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn) if kind == "fp8" else (ml_dtypes.bfloat16, torch.bfloat16)
        given["keys"] = prompt["keys"].astype(dtype)
        prompt = {**prompt, "keys": torch.from_numpy(prompt["keys"]).to(like)}
        assert given["keys"].tobytes() == prompt["keys"].view(torch.uint8).numpy().tobytes()
    elif kind == "dlpack":
        given["keys"] = memoryview_of(prompt["keys"])
    same(client.select(**given, policy=POLICY, layout=layout), graphkv.select(**prompt, policy=POLICY))


def memoryview_of(array: Any) -> Any:
    class Foreign:
        shape = array.shape

        def __dlpack__(self, **options: Any) -> Any:
            return array.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    return Foreign()


def test_every_argument_travels(client: CompressClient, prompt: dict[str, Any]) -> None:
    rope = Rope(tuple(10_000 ** (-i / 8) for i in range(8)), 16)
    settings = {"policy": Policy.sequential(50), "rope": rope, "pinned": [(60, 70)]}
    given = {**prompt, "positions": np.cumsum(np.ones((2, 201), np.int64) * 3, axis=1)}
    for inputs in (given, {role: torch.from_numpy(array) for role, array in given.items()}):
        same(client.select(**inputs, **settings), graphkv.select(**given, **settings))
    similar = {**prompt, "similarity_keys": prompt["keys"][..., :5]}
    settings = {"policy": Policy.sequential(50)}
    same(client.select(**similar, **settings), graphkv.select(**similar, **settings))


def test_a_batch_is_a_list(client: CompressClient, prompt: dict[str, Any]) -> None:
    shorter = {"keys": list(prompt["keys"][:, :, :90]), "queries": prompt["queries"]}
    given = {role: [prompt[role], shorter[role]] for role in prompt}
    kept = client.select(**given, policy=POLICY, pinned=[None, [(3, 9)]])
    assert isinstance(kept, list)
    same(kept[0], graphkv.select(**prompt, policy=POLICY))
    same(kept[1], graphkv.select(**shorter, policy=POLICY, pinned=[(3, 9)]))
    assert [layer.prompt for layer in kept[1]] == [1, 1]


def test_a_prompt_that_is_kept_whole_sends_next_to_nothing(client: CompressClient, prompt: dict[str, Any]) -> None:
    given = {role: torch.from_numpy(array) for role, array in prompt.items()}
    kept = client.select(**given, policy=Policy(201))
    assert kept.indices[0].tolist() == [list(range(201))] * 3  # type: ignore[union-attr]
    assert kept.summary.sent_bytes == 2 * 3 * 3 * 8, "the facts alone"  # type: ignore[union-attr]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str, str]] = {
    "NaN in a key": (lambda given: {"keys": with_nan(given["keys"])}, "keys", "NON_FINITE"),
    "NaN in a query": (lambda given: {"queries": with_nan(given["queries"])}, "queries", "NON_FINITE"),
    "pinned above the budget": (lambda given: {"pinned": [(0, 51)]}, "pinned", "BAD_POLICY"),
    "pinned pages above the budget": (
        lambda given: {"policy": Policy(50, page_size=16), "pinned": [(0, 1), (40, 41), (80, 81), (120, 121)]},
        "pinned",
        "BAD_POLICY",
    ),
    "no queries for a cake budget": (
        lambda given: {"policy": Policy(50, scorer="knorm", window=9, budget_allocation="cake"), "queries": None},
        "queries",
        "BAD_SHAPE",
    ),
    "scores for a cake budget": (
        lambda given: {"policy": CAKE, "queries": None, "scores": given["keys"][..., 0]},
        "scores",
        "BAD_SHAPE",
    ),
    "NaN in a key, a cake budget": (lambda given: {"policy": CAKE, "keys": with_nan(given["keys"])}, "keys", "NON_FINITE"),
    "NaN in a query, a model's answer": (
        lambda given: {"policy": Policy(50, granularity="model"), "queries": with_nan(given["queries"])},
        "queries",
        "NON_FINITE",
    ),
    "an output of each head for a layer": (
        lambda given: {"policy": Policy(50, granularity="layer"), "outputs": ["decay_factors"]},
        "outputs",
        "BAD_SHAPE",
    ),
    "no rope": (lambda given: {"policy": Policy.sequential(50)}, "rope", "ROPE_MISSING"),
    "unknown encoding": (lambda given: {"encoding": "int8"}, "encoding", "UNKNOWN_NAME"),
    "no timeout": (lambda given: {"timeout": 0}, "timeout", "BAD_POLICY"),
}


def with_nan(array: Any) -> Any:
    changed = array.copy()
    changed[1, 2, 3, 4] = np.nan
    return changed


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_typed_wherever_it_is_found(
    server: Server, client: CompressClient, prompt: dict[str, Any], name: str, kind: str
) -> None:
    change, argument, reason = WRONG[name]
    given = {"policy": POLICY, **prompt, **change(prompt)}
    if kind == "torch":
        given = {role: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for role, value in given.items()}
    with pytest.raises(InvalidInputError) as raised:
        client.select(**given)
    assert (raised.value.argument, raised.value.reason) == (argument, reason)
    if not {"encoding", "timeout"} & given.keys():
        with pytest.raises(InvalidInputError) as here:
            graphkv.select(**given)
        assert (here.value.argument, here.value.reason) == (argument, reason)
    assert not raised.value.retryable
    if reason == "NON_FINITE":
        assert raised.value.request_id
    assert server.settled()


def test_nobody_there() -> None:
    with CompressClient("127.0.0.1:9") as client:
        with pytest.raises(UnavailableError) as raised:
            client.ping()
        assert raised.value.retryable
        with pytest.raises(UnavailableError) as raised:
            client.select(np.ones((1, 1, 9, 2)), scores=np.ones((1, 1, 9)), policy=Policy(4))
        assert raised.value.request_id
        assert isinstance(raised.value.__cause__, grpc.RpcError)


def test_a_deadline_that_passes() -> None:
    def hang(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(30)
        yield from ()

    with stand_in(hang) as address, CompressClient(address, timeout=30) as client:
        with pytest.raises(DeadlineError) as raised:
            client.select(np.ones((1, 1, 9, 2)), scores=np.ones((1, 1, 9)), policy=Policy(4), timeout=0.2)
        assert isinstance(raised.value, TimeoutError)
        assert raised.value.reason == "EXPIRED"
        assert raised.value.request_id


@pytest.mark.parametrize("kept", [0, 1], ids=["nothing", "one of two layers"])
def test_an_answer_in_part_is_none(prompt: dict[str, Any], kept: int) -> None:
    def partly(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        seen = Seen()
        for message in requests:
            seen.take(message)
        assert seen.header is not None
        for layer in range(kept):
            yield answer(seen.header, layer)
        yield end_of(seen.header)

    with stand_in(partly) as address, CompressClient(address) as client:
        with pytest.raises(InternalError) as raised:
            client.select(**prompt, policy=POLICY)
        assert raised.value.request_id


def test_a_mistake_found_while_sending_ends_the_call(prompt: dict[str, Any]) -> None:
    ended = threading.Event()

    def listen(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        if not context.add_callback(ended.set):  # it has ended already
            ended.set()
        for message in requests:
            assert not message.HasField("end")
        yield from ()

    given = {role: torch.from_numpy(array) for role, array in prompt.items()}
    given["keys"][1, 0, 0, 0] = np.inf
    with stand_in(listen) as address, CompressClient(address) as client:
        with pytest.raises(InvalidInputError) as raised:
            client.select(**given, policy=POLICY)
        assert raised.value.reason == "NON_FINITE"
        assert "layer 1" in str(raised.value)
        assert ended.wait(10), "the call is cancelled, not left to its deadline"


def test_a_closed_client_raises(server: Server, prompt: dict[str, Any]) -> None:
    client = CompressClient(server.address)
    client.select(**prompt, policy=POLICY)
    stream = client.stream(num_layers=2, policy=POLICY)
    client.close()
    client.close()
    for use in (
        client.ping,
        client.capabilities,
        lambda: client.select(**prompt, policy=POLICY),
        lambda: client.stream(num_layers=2, policy=POLICY),
    ):
        with pytest.raises(InvalidInputError, match="closed") as raised:
            use()
        assert raised.value.reason == "CLOSED"
    with stream, pytest.raises(InvalidInputError, match="closed"):
        stream.put(0, keys=prompt["keys"][0], queries=prompt["queries"][0])


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"address": ""}, "address"),
        ({"address": None}, "address"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"timeout": np.bool_(True)}, "timeout"),
        ({"timeout": 10**400}, "timeout"),
        ({"timeout": "30"}, "timeout"),
        ({"max_buffered_bytes": 0}, "max_buffered_bytes"),
    ],
)
def test_options_are_checked_at_construction(options: dict[str, Any], argument: str) -> None:
    for make in (ClientOptions, CompressClient):
        with pytest.raises(InvalidInputError) as raised:
            make(**{"address": "127.0.0.1:1", **options})
        assert raised.value.argument == argument


@pytest.mark.parametrize("timeout", [np.float32(20), np.float64(20), np.int64(20), 20])
def test_a_timeout_is_any_real_number(client: CompressClient, timeout: Any) -> None:
    assert client.ping(timeout=timeout) < 20
    assert ClientOptions(address="127.0.0.1:1", timeout=timeout, max_buffered_bytes=np.int64(9)).timeout == 20
    with CompressClient(client._options.address, timeout=timeout) as own:
        assert type(own._limit(None)) is type(own._limit(timeout)) is float


def test_capabilities_and_ping(client: CompressClient) -> None:
    capabilities = client.capabilities()
    assert capabilities.version == graphkv.__version__
    assert capabilities.encodings == ("exact",)
    assert 0 < client.ping() < 30


def test_many_threads_share_a_client(server: Server, client: CompressClient, prompt: dict[str, Any]) -> None:
    wanted = [graphkv.select(**prompt, policy=Policy(budget)) for budget in range(40, 48)]

    def one(budget: int) -> Any:
        return client.select(**prompt, policy=Policy(budget))

    with ThreadPoolExecutor(4) as pool:
        for given, right in zip(pool.map(one, range(40, 48)), wanted, strict=True):
            same(given, right)
    assert server.settled()


def test_nothing_is_left_behind(client: CompressClient, prompt: dict[str, Any]) -> None:
    def calls() -> None:
        for _ in range(5):
            client.select(**prompt, policy=POLICY)
            with pytest.raises(GraphKVError):
                client.select(**{**prompt, "keys": with_nan(prompt["keys"])}, policy=POLICY)
            with client.stream(num_layers=2, policy=POLICY) as stream:
                stream.put(0, keys=prompt["keys"][0], queries=prompt["queries"][0])

    calls()
    before = threading.active_count()
    calls()
    gc.collect()
    assert wait_until(lambda: threading.active_count() <= before)
