"""Hypothesis strategies for everything that crosses the wire; each value is valid, none needs torch."""

from typing import Any

import numpy as np
from graphkv_proto.encodings import ENCODINGS
from graphkv_proto.messages import FEATURES, Descriptor, End, Header, Prompt
from graphkv_proto.messages.tensor import AXES
from graphkv_proto.tensors import DTYPES, item_size
from hypothesis import strategies as st

from graphkv.terms.capabilities import Capabilities
from graphkv.terms.catalogue import BUDGETS, GRANULARITIES, POOLINGS, SCORERS, SIGNALS, SIMILARITIES, UPDATES
from graphkv.terms.policy import Graph, Policy
from graphkv.terms.rope import Rope
from graphkv.terms.selection import LayerSelection, Summary

MOST = 2**63 - 1
shares = st.floats(0.0, 1.0)
request_ids = st.text("abcXYZ019._-", max_size=64)


def named(table: Any) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(table))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    update = draw(named(UPDATES))
    neighbors = draw(st.one_of(st.none(), st.just("auto"), st.integers(1, MOST)))
    least = 0.0 if neighbors is not None or update == "sequential" else 2.0**-30
    return Graph(
        source_ratio=draw(shares),
        neighbors=neighbors,
        threshold=draw(st.floats(least, 1.0)),
        candidates=draw(st.none() | st.floats(1.0, allow_infinity=False)),
        similarity=draw(named(SIMILARITIES)),
        rounds=1 if update == "additive" else draw(st.integers(0, 64)),
        strength=draw(shares),
        signal="decay" if update == "sequential" else draw(named(SIGNALS)),
        update=update,
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    return Policy(
        draw(st.integers(1, MOST) | st.floats(0.0, 1.0, exclude_min=True)),
        scorer=draw(named(SCORERS)),
        budget_allocation=draw(named(BUDGETS)),
        window=draw(st.none() | st.integers(1, MOST)),
        pool_width=draw(st.none() | st.integers(0, 511).map(lambda half: 2 * half + 1)),
        pooling=draw(named(POOLINGS)),
        sinks=draw(st.none() | st.integers(0, MOST)),
        granularity=draw(named(GRANULARITIES)),
        page_align=draw(st.none() | st.integers(1, MOST)),
        graph=draw(st.none() | graphs()),
    )


@st.composite
def ropes(draw: st.DrawFn) -> Rope:
    frequencies = draw(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
    return Rope(tuple(frequencies), 2 * len(frequencies), draw(st.booleans()))


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    tokens = draw(st.integers(1, 2**31 - 1))
    bounds = st.lists(st.integers(0, tokens), min_size=2, max_size=2, unique=True).map(sorted).map(tuple)
    return Prompt(tokens, tuple(draw(st.lists(bounds, max_size=3))))


@st.composite
def headers(draw: st.DrawFn) -> Header:
    kv_heads = draw(st.integers(1, 2**20))
    largest = draw(st.integers(0, MOST // 2))
    return Header(
        policy=draw(policies()),
        layers=draw(st.integers(1, MOST)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, MOST)),
        largest_layer_bytes=largest,
        total_bytes=draw(st.integers(largest, MOST)),
        prompts=tuple(draw(st.lists(prompts(), min_size=1, max_size=3))),
        query_heads=kv_heads * draw(st.integers(0, 9)),
        caller_scores=draw(st.booleans()),
        encoding=draw(named(ENCODINGS)),
        rope=draw(st.none() | ropes()),
        request_id=draw(request_ids),
        priority=draw(st.integers(-(2**31), 2**31 - 1)),
        required_features=tuple(draw(st.lists(named(FEATURES), max_size=2))),
        minor=draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def descriptors(draw: st.DrawFn) -> Descriptor:
    role, dtype = draw(named(AXES)), draw(named(DTYPES))
    rank = draw(st.sampled_from(AXES[role])).count(",") + 1
    dims = tuple(draw(st.lists(st.integers(1, 2**14), min_size=rank, max_size=rank)))
    count = draw(st.integers(0, MOST))
    return Descriptor(
        id=draw(st.integers(0, MOST)),
        prompt=draw(st.integers(0, MOST)),
        layer=draw(st.integers(0, MOST)),
        role=role,
        dtype=dtype,
        dims=dims,
        layout=draw(st.sampled_from(["HND", "NHD"])),
        start=draw(st.integers(0, MOST)) if count else 0,
        count=count,
        byte_length=int(np.prod(dims, dtype=object)) * item_size(dtype),
    )


ends = st.builds(End, st.integers(0, MOST), st.integers(0, MOST), st.integers(0, 2**32 - 1))


@st.composite
def selections(draw: st.DrawFn) -> LayerSelection:
    """Rectangular or ragged, with rows of no tokens too; indices are numpy int32."""
    num_tokens = draw(st.integers(1, 2**31 - 1))
    heads = draw(st.integers(1, 5))
    slots = st.integers(0, num_tokens - 1)
    if draw(st.booleans()):
        rows: Any = [np.array(sorted(draw(st.lists(slots, max_size=7, unique=True))), np.int32) for _ in range(heads)]
    else:
        width = draw(st.integers(0, min(7, num_tokens)))
        row = st.lists(slots, min_size=width, max_size=width, unique=True).map(sorted)
        rows = np.array([draw(row) for _ in range(heads)], np.int32).reshape(heads, width)
    return LayerSelection(
        layer=draw(st.integers(0, MOST)),
        indices=rows,
        num_tokens=num_tokens,
        kept_score_ratio=draw(shares),
        changed=draw(st.integers(0, MOST)),
        importance=draw(named(SCORERS) | st.just("scores")),
        fingerprint=draw(st.text("0123456789abcdef", min_size=16, max_size=16)),
        prompt=draw(st.integers(0, MOST)),
        exact=draw(st.booleans()),
    )


summaries = st.builds(
    Summary,
    request_id=request_ids,
    sent_bytes=st.integers(0, MOST),
    encoding=named(ENCODINGS),
    transport=st.sampled_from(["tcp", "region", "device"]),
    where=st.text(max_size=20),
    seconds=st.dictionaries(st.text(max_size=9), st.floats(0.0, 1e6), max_size=4),
)


@st.composite
def capabilities(draw: st.DrawFn) -> Capabilities:
    def some(table: Any) -> tuple[str, ...]:
        return tuple(draw(st.lists(named(table), unique=True)))

    return Capabilities(
        version=draw(st.text(max_size=9)),
        protocol_minor=draw(st.integers(0, 2**32 - 1)),
        replica=draw(st.text(max_size=9)),
        device=draw(st.text(max_size=9)),
        max_bytes_in_flight=draw(st.integers(1, MOST)),
        max_message_bytes=draw(st.integers(1, MOST)),
        chunk_bytes=draw(st.integers(1, MOST)),
        metrics_address=draw(st.text(max_size=9)),
        features=some(FEATURES),
        scorers=some(SCORERS),
        budget_allocations=some(BUDGETS),
        granularities=some(GRANULARITIES),
        signals=some(SIGNALS),
        updates=some(UPDATES),
        similarities=some(SIMILARITIES),
        encodings=some(ENCODINGS),
    )
