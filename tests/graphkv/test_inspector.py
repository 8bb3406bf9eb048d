"""`graphkv.inspector`: the record is what `graphkv.select` does, by independent formulas; the page holds the record."""

import base64
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphkv
from graphkv import Graph, InvalidInputError, Policy
from graphkv.inspector import LayerRecord, Neighbors, PolicyRecord, RowRecord, record, write_page
from graphkv.kernels.decay.naive import edges_of, neighbors_of
from graphkv.rope import unrotate
from graphkv.rows import unit
from graphkv.terms.catalogue import SCORERS
from graphkv.terms.needs import query_rows
from graphkv.terms.rope import Rope

ROPE = Rope(tuple(10000 ** (-i / 8) for i in range(8)), 16)
POLICIES = {
    "snapkv": Policy.snapkv(48),
    "default": Policy(48),
    "paper": Policy.paper(48),
    "sequential": Policy.sequential(48, strength=0.5),
    "pyramid": Policy.sequential(48, budget_allocation="pyramid"),
    "sequential-all": Policy(48, graph=Graph(update="sequential", candidates=None)),
    "evict": Policy(48, graph=Graph(signal="evict", threshold=0.3)),
    "enhance": Policy(48, graph=Graph(signal="enhance", threshold=0.3, rounds=2)),
    "additive": Policy(48, graph=Graph(update="additive", neighbors=2, threshold=0.0)),
    "knorm": Policy(48, scorer="knorm", graph=Graph(threshold=0.3)),
    "keydiff": Policy.sequential(48, scorer="keydiff"),
    "h2o": Policy(48, scorer="h2o", graph=Graph(threshold=0.3)),
    "tova": Policy.sequential(48, scorer="tova"),
    "cake": Policy.paper(48, scorer="cake"),
    "ratio": Policy.sequential(0.25),
    "budget-1": Policy(1, scorer="knorm", window=0),
    "keep-all": Policy.sequential(500),
}


def inputs(policy: Policy, n: int = 257) -> dict[str, Any]:
    random = torch.Generator().manual_seed(7)
    heads = torch.randn(3, 2, 60, 16, generator=random)
    repeats = heads[:, :, torch.randint(60, (n,), generator=random)]  # look-alikes, so that there is something to propagate
    keys = repeats + 0.4 * torch.randn(3, 2, n, 16, generator=random)
    given: dict[str, Any] = {"keys": keys, "policy": policy, "rope": ROPE if policy.needs_rope else None}
    if SCORERS[policy.scorer].reads_attention:
        rows = query_rows(policy, n)
        given["queries"] = torch.randn(3, 4, 5 if rows is None else rows, 16, generator=random)
    return given


@pytest.fixture(params=POLICIES)
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], PolicyRecord]:
    given = inputs(POLICIES[request.param])
    return given, record(**given, name=request.param)


def test_keeps_what_select_keeps(case: tuple[dict[str, Any], PolicyRecord]) -> None:
    given, entry = case
    selection = graphkv.select(**given)
    for layer, answer in zip(entry.layers, selection, strict=True):
        assert [row.kept.nonzero()[0].tolist() for row in layer.rows] == answer.indices.tolist()
        assert (layer.kept_score_ratio, layer.changed) == (answer.kept_score_ratio, answer.changed)


def test_what_it_tells_leads_to_what_is_kept(case: tuple[dict[str, Any], PolicyRecord]) -> None:
    """Always kept, plus the best by updated score (sequential: the order of choice), and nothing else."""
    _, entry = case
    for layer in entry.layers:
        always = {token for start, stop in layer.always for token in range(start, stop)}
        for row in layer.rows:
            places = int(row.kept.sum()) - len(always)
            if entry.policy.graph is not None and entry.policy.graph.update == "sequential" and len(row.sources):
                chosen = row.sources.tolist()
            else:
                order = sorted(range(len(row.candidates)), key=lambda slot: (-row.updated[slot], row.candidates[slot]))
                chosen = row.candidates[order][:places].tolist()
            assert set(row.kept.nonzero()[0].tolist()) == always | set(chosen)
            assert np.isnan(row.scores).nonzero()[0].tolist() == sorted(always)


def test_candidates_are_the_best_by_base_score_and_sources_the_best_of_them() -> None:
    for name in ("default", "paper", "knorm"):
        entry = record(**inputs(POLICIES[name]))
        for row in entry.rows:
            order = sorted((t for t in range(257) if not math.isnan(row.scores[t])), key=lambda t: (-row.scores[t], t))
            assert row.candidates.tolist() == order[: len(row.candidates)]
            assert row.sources.tolist() == order[:14]


@pytest.mark.parametrize("name", ["default", "paper", "evict", "enhance", "additive", "knorm"])
def test_neighbors_and_factors_by_the_formula(name: str) -> None:
    given = inputs(POLICIES[name])
    entry = record(**given)
    graph = entry.policy.graph
    assert graph is not None
    for index, row in enumerate(entry.rows):
        slots = sorted(row.candidates.tolist())
        keys = unit(given["keys"][index // 2, index % 2, slots])
        sources = {slots.index(token) for token in row.sources.tolist()}
        most = graph.neighbor_count(48, len(sources))
        factors, sign = dict.fromkeys(slots, 1.0), 1.0 if graph.signal == "enhance" else -1.0
        for place, source in enumerate(row.sources.tolist()):
            edges = edges_of(keys, slots.index(source))
            expected = neighbors_of(edges, sources, most, graph.threshold)
            assert row.neighbors.counts[place] == len(expected)
            shown = row.neighbors.tokens[place]
            assert shown[shown >= 0].tolist() == [slots[slot] for slot in expected][:24]
            assert row.neighbors.similarity[place][: len(expected)] == pytest.approx(
                [edges[s] for s in expected][:24], abs=2e-6
            )
            for slot in expected:
                change = sign * graph.strength * edges[slot]
                factors[slots[slot]] = (
                    factors[slots[slot]] + change if graph.update == "additive" else factors[slots[slot]] * (1 + change)
                )
        for token, factor, updated in zip(row.candidates.tolist(), row.factors, row.updated, strict=True):
            if graph.signal == "evict":
                assert math.isnan(factor) == (updated < 0)
            elif row.scores[token] - row.shift > 0:
                assert factor == pytest.approx(factors[token] ** graph.rounds, rel=1e-4, abs=1e-5)
                assert updated == pytest.approx(
                    (row.scores[token] - row.shift) * factors[token] ** graph.rounds, rel=1e-4, abs=1e-6
                )


@pytest.mark.parametrize("name", ["sequential", "sequential-all"])
def test_sequential_scores_when_each_token_was_kept(name: str) -> None:
    given = inputs(POLICIES[name])
    entry = record(**given)
    graph = entry.policy.graph
    assert graph is not None
    for index, row in enumerate(entry.rows):
        keys = given["keys"][index // 2, index % 2, row.candidates]
        if entry.policy.needs_rope:
            keys = unrotate(keys, torch.from_numpy(row.candidates).long(), ROPE)
        keys = unit(keys)
        slot = {token: place for place, token in enumerate(row.candidates.tolist())}
        left, factors = set(slot), dict.fromkeys(slot, 1.0)
        for step, token in enumerate(row.sources.tolist()):
            left.remove(token)
            edges = edges_of(keys, slot[token])
            assert all(factors[token] * row.scores[token] >= factors[other] * row.scores[other] * (1 - 1e-6) for other in left)
            changed = {other: edges[slot[other]] for other in left if edges[slot[other]] > 0}
            assert row.neighbors.counts[step] == len(changed)
            best = sorted(changed.values(), reverse=True)[:24]
            assert row.neighbors.similarity[step][: len(best)] == pytest.approx(best, abs=2e-6)
            for other in left:
                factors[other] *= 1 - graph.strength * edges[slot[other]]
        assert row.factors == pytest.approx([factors[token] for token in row.candidates.tolist()], rel=1e-4)


# ---- the page


def words(text: str) -> np.ndarray:
    planes = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    low, high = planes.reshape(2, -1).astype(np.uint16)
    return low | (high << 8)


def floats(text: str) -> np.ndarray:
    return (words(text).astype(np.uint32) << 16).view(np.float32)


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="record" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    data = json.loads(found[1])
    assert isinstance(data, dict)
    return data


def close(decoded: Any, exact: Any) -> bool:
    return bool(np.allclose(decoded, exact, rtol=2**-8, atol=1e-37, equal_nan=True))


@pytest.mark.parametrize(
    "names",
    [["sequential"], ["sequential", "paper"], ["pyramid", "knorm"], ["evict", "snapkv"], ["keep-all", "default"]],
    ids="-".join,
)
def test_the_page_decodes_to_the_record(names: list[str]) -> None:
    entries = [record(**inputs(POLICIES[name]), name=name) for name in names]
    data = embedded(write_page([f" w{token}" for token in range(257)], entries, layers=[0, 6, 11]))
    assert data["layerNumbers"] == [0, 6, 11]
    assert data["tokens"][13] == " w13"
    assert (data["layers"], data["heads"]) == (3, 2)
    for entry, told in zip(entries, data["policies"], strict=True):
        scores = data["scores"][told["scores"]]
        order, ranked = words(scores["order"]).reshape(6, -1), floats(scores["ranked"]).reshape(6, -1)
        kept = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(told["kept"])), dtype=np.uint8))[: 6 * 257]
        factors, tokens = iter(floats(told["factors"])), iter(words(told["sourceTokens"]))
        counts, near = iter(words(told["neighborCounts"])), iter(words(told["neighborTokens"]))
        similarities = iter(words(told["similarities"]) / 65535)
        assert Policy.from_dict(told["policy"]) == entry.policy
        assert told["budgets"] == [layer.budget for layer in entry.layers]
        assert [tuple(map(tuple, ranges)) for ranges in told["always"]] == [layer.always for layer in entry.layers]
        for index, row in enumerate(entry.rows):
            competes = ~np.isnan(row.scores[order[index]])
            assert close(ranked[index][competes], row.scores[order[index]][competes])
            assert order[index][competes][: told["candidates"][index]].tolist() == row.candidates.tolist()
            assert kept.reshape(6, -1)[index].astype(bool).tolist() == row.kept.tolist()
            assert told["shifts"][index] == row.shift
            assert close([next(factors) for _ in row.candidates], row.factors)
            assert [int(next(tokens)) for _ in range(told["sources"][index])] == row.sources.tolist()
            for place, count in enumerate(row.neighbors.counts.tolist()):
                assert next(counts) == count
                shown = min(count, data["listed"])
                assert [int(next(near)) for _ in range(shown)] == row.neighbors.tokens[place][:shown].tolist()
                assert [next(similarities) for _ in range(shown)] == pytest.approx(
                    row.neighbors.similarity[place][:shown], abs=1e-5
                )
        assert [list(left) for left in (factors, tokens, counts, near, similarities)] == [[]] * 5


def test_policies_that_score_alike_share_their_scores() -> None:
    entries = [record(**inputs(POLICIES[name])) for name in ("sequential", "snapkv")]  # sinks 4 and 0
    assert len(embedded(write_page([""] * 257, entries))["scores"]) == 1
    entries[1] = record(**inputs(POLICIES["knorm"]))
    assert len(embedded(write_page([""] * 257, entries))["scores"]) == 2


def test_the_page_fetches_nothing_and_text_cannot_leave_its_place() -> None:
    tokens = ["</script><script>alert(1)</script>", "<!--", "{data}", "/*page.js*/", "\u2028", "é\n"] + [" x"] * 251
    page = write_page(tokens, [record(**inputs(POLICIES["default"]))], title='<b>"{data}')
    assert embedded(page)["tokens"] == tokens
    assert page.count("<script") == page.count("</script>") == 2
    assert "<title>&lt;b&gt;&quot;{data} · graphkv inspect</title>" in page
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    links = set(re.findall(r"https?://[^\"'\s)]+", page))
    assert links <= {"http://www.w3.org/2000/svg"}  # a name, not an address that is fetched


def synthetic(n: int, layers: int, heads: int, policy: Policy, sources: int, candidates: int) -> PolicyRecord:
    """As large as a real record gets, and random, which compresses worst."""
    random = np.random.default_rng(0)

    def row() -> RowRecord:
        order = random.permutation(n).astype(np.int32)
        similarity = -np.sort(-random.random((sources, 24), dtype=np.float32), axis=1)
        near = random.integers(n, size=(sources, 24), dtype=np.int32)
        scores = np.empty(n, dtype=np.float32)
        scores[order] = np.sort(random.lognormal(-8, 2, n).astype(np.float32))[::-1]
        factors = random.random(candidates, dtype=np.float32)
        neighbors = Neighbors(np.full(sources, 999, dtype=np.int32), near, similarity)
        best = order[:candidates]
        return RowRecord(scores, 0.0, best, scores[best] * factors, factors, best[:sources], neighbors, random.random(n) < 0.1)

    each = [LayerRecord(512, ((n - 32, n),), 0.5, 9, tuple(row() for _ in range(heads))) for _ in range(layers)]
    return PolicyRecord("synthetic", policy, n, tuple(each))


def test_a_page_of_4000_tokens_30_layers_and_3_heads_is_under_5_mib() -> None:
    first = synthetic(4000, 30, 3, Policy.sequential(512), 476, 1024)
    second = synthetic(4000, 30, 3, Policy.paper(512), 153, 3968)
    for entries in ([first], [first, second]):
        page = write_page([f" word{token}" for token in range(4000)], entries)
        assert len(page.encode()) < 5 * 2**20
        assert embedded(page)["listed"] >= 2


@pytest.mark.parametrize(
    ("tokens", "names", "argument"),
    [(256, ["default"], "tokens"), (257, [], "records"), (257, ["default"] * 3, "records")],
    ids=["a-token-less", "no-record", "three"],
)
def test_what_does_not_fit_together_is_named(tokens: int, names: list[str], argument: str) -> None:
    entries = [record(**inputs(POLICIES[name])) for name in names]
    with pytest.raises(InvalidInputError) as refused:
        write_page(["x"] * tokens, entries)
    assert refused.value.argument == argument


def test_as_many_layer_numbers_as_layers() -> None:
    with pytest.raises(InvalidInputError, match="3 numbers"):
        write_page(["x"] * 257, [record(**inputs(POLICIES["snapkv"]))], layers=[1, 2])


def test_a_batch_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="one prompt"):
        record([torch.ones(1, 1, 9, 4)] * 2, policy=Policy(3, scorer="knorm"))


def test_the_guides_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
    found = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(found) == 1
    made: dict[str, Any] = {}
    exec(found[0], made)
    assert capsys.readouterr().out.startswith("4 [")
    assert embedded(made["page"])["title"] == "noise"
