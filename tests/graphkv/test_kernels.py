"""Every operation's fast form against its formula, on shapes that do not fit any tile."""

import math

import pytest
import torch

from graphkv.kernels import CHUNKED, KERNELS, NAIVE, Kernels, kernels_for
from graphkv.kernels.products import products
from graphkv.rows import Row, Updated
from graphkv.terms.policy import Graph

DEVICES = [device for device in KERNELS if device == "cpu" or (device == "cuda" and torch.cuda.is_available())]


def keys_of(tokens: int, dim: int, seed: int, *, clusters: int = 5, noise: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(clusters, dim, generator=generator)
    keys = centers[torch.randint(clusters, (tokens,), generator=generator)]
    keys = keys + noise * torch.randn(tokens, dim, generator=generator)
    keys[::17] = keys[0].clone()  # duplicates
    keys[5::23] = 0.0
    return keys


def row_of(tokens: int, dim: int, seed: int, *, select: int, sources: int = 0, neighbors: int | None = None) -> Row:
    scores = torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Row(scores, select, sources, neighbors, keys_of(tokens, dim, seed))


def moved(row: Row, device: str) -> Row:
    keys = None if row.keys is None else row.keys.to(device)
    return Row(row.scores.to(device), row.select, row.sources, row.neighbors, keys)


def order_of(updated: Updated) -> list[int]:
    assert updated.order is not None
    order: list[int] = updated.order.tolist()
    return order


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("tokens", "window", "heads", "kv_heads", "dim"), [(7, 3, 2, 1, 8), (513, 5, 6, 2, 63), (1500, 32, 8, 1, 64)]
)
def test_window_scores(device: str, tokens: int, window: int, heads: int, kv_heads: int, dim: int) -> None:
    torch.manual_seed(tokens)
    queries, keys = torch.randn(heads, window, dim), torch.randn(kv_heads, tokens, dim)
    wanted = NAIVE.window_scores(queries, keys)
    given = kernels_for(torch.device(device)).window_scores(queries.to(device), keys.to(device)).cpu()
    assert given.shape == (heads, tokens - window)
    torch.testing.assert_close(given, wanted, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 100])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_top_tokens_keeps_the_lower_index_of_equals(device: str, count: int, levels: int) -> None:
    values = torch.randint(levels, (5, 65), generator=torch.Generator().manual_seed(count)).to(torch.float32)
    values[1, 7:20] = -math.inf
    values[2] = -math.inf
    values[3, ::2] = -0.0
    wanted = NAIVE.top_tokens(values, count)
    assert torch.equal(kernels_for(torch.device(device)).top_tokens(values.to(device), count).cpu(), wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "dim", "sources", "neighbors", "threshold"), [
    (3, 2, 1, 1, 0.0), (65, 63, 1, None, 0.9), (64, 8, 30, 4, 0.0), (700, 64, 129, 7, 0.5), (515, 80, 65, 600, 0.0),
])  # fmt: skip
@pytest.mark.parametrize("graph", [
    Graph(neighbors="auto", threshold=0.0), Graph(neighbors="auto", threshold=0.0, strength=0.3, rounds=3),
    Graph(neighbors="auto", threshold=0.0, update="additive", strength=0.2), Graph(neighbors="auto", signal="enhance"),
    Graph(neighbors="auto", signal="evict"),
], ids=lambda graph: f"{graph.signal}-{graph.update}-{graph.rounds}")  # fmt: skip
def test_decay(device: str, tokens: int, dim: int, sources: int, neighbors: int | None, threshold: float, graph: Graph) -> None:
    row = row_of(tokens, dim, tokens, select=tokens // 2, sources=sources, neighbors=neighbors)
    given = {name: getattr(graph, name) for name in ("strength", "rounds", "signal", "update")}
    graph = Graph(neighbors="auto", threshold=threshold, **given)
    wanted = NAIVE.decay(row, graph)
    updated = kernels_for(torch.device(device)).decay(moved(row, device), graph)
    torch.testing.assert_close(updated.scores.cpu(), wanted.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(updated.factors.cpu(), wanted.factors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_sequential_rows_of_many_sizes_at_once(device: str, strength: float) -> None:
    sizes = [(1, 1), (2, 1), (64, 64), (65, 20), (300, 150), (300, 7)]
    rows = [row_of(tokens, 24, tokens + select, select=select) for tokens, select in sizes]
    wanted = NAIVE.sequential(rows, strength)
    given = kernels_for(torch.device(device)).sequential([moved(row, device) for row in rows], strength)
    for size, own, right in zip(sizes, given, wanted, strict=True):
        assert order_of(own) == order_of(right), size
        torch.testing.assert_close(own.scores.cpu(), right.scores, rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(own.factors.cpu(), right.factors, rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(own.comparable.cpu(), right.comparable, rtol=1e-4, atol=1e-4)


def test_sequential_without_room_for_the_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row_of(200, 24, seed, select=90) for seed in range(3)]
    squares = CHUNKED.sequential(rows, 0.3)
    monkeypatch.setattr("graphkv.kernels.sequential.chunked._WIDEST", 10)
    assert [order_of(own) for own in CHUNKED.sequential(rows, 0.3)] == [order_of(own) for own in squares]


def test_zero_scores_come_last_by_index() -> None:
    scores = torch.tensor([0.0, 0.5, 0.0, 1.0, 0.0], dtype=torch.float64)
    row = Row(scores, 4, keys=torch.eye(5))
    assert order_of(CHUNKED.sequential([row], 0.1)[0]) == [3, 1, 0, 2]
    assert order_of(NAIVE.sequential([row], 0.1)[0]) == [3, 1, 0, 2]


@pytest.mark.parametrize("kernels", [CHUNKED, NAIVE], ids=["chunked", "naive"])
def test_what_is_left_of_nothing_ties_with_what_was_nothing(kernels: Kernels) -> None:
    """A score of 0 and a factor of 0 are both minus infinity in logs: by index, and sources once they are kept."""
    scores = torch.tensor([0.0, 0.5, 0.0, 1.0, 0.0, 0.25], dtype=torch.float64)
    keys = torch.eye(6)
    keys[1] = keys[3]
    keys[4] = keys[0]
    [own] = kernels.sequential([Row(scores, 4, keys=keys)], 1.0)
    assert order_of(own) == [3, 5, 0, 1]
    assert own.factors.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert own.scores.tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 0.25]


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 333, 63), (64, 512, 64), (65, 513, 128)], ids=str)
def test_a_product_depends_on_its_two_vectors_alone(shape: tuple[int, int, int]) -> None:
    rows, columns, dim = shape
    left, right = torch.randn(rows, dim), torch.randn(columns + 3, dim)[3:]
    whole = products(left, right)
    torch.testing.assert_close(whole, left @ right.T, rtol=1e-5, atol=1e-5)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(products(left, right), whole)
            assert torch.equal(products(left[:1], right), whole[:1])
            assert torch.equal(products(left, right[columns // 2 :].clone()), whole[:, columns // 2 :])
    finally:
        torch.set_num_threads(threads)


def test_norms_neither_underflow_nor_overflow() -> None:
    keys = torch.tensor([[3e-20, 4e-20], [3e4, 4e4], [0.0, 0.0]], dtype=torch.float32)
    wanted = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(Row(torch.zeros(3), 1, keys=keys).unit_keys(), wanted)
    half = torch.full((1, 64), 300.0, dtype=torch.float16)
    torch.testing.assert_close(Row(torch.zeros(1), 1, keys=half).unit_keys(), torch.full((1, 64), 0.125))
