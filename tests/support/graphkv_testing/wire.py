"""Hypothesis strategies for everything that crosses the wire; each value is valid, none needs torch."""

from typing import Any

import numpy as np
from graphkv_proto.encodings import ENCODINGS
from graphkv_proto.messages import FEATURES, Descriptor, End, Header, Prompt
from graphkv_proto.messages.tensor import AXES
from graphkv_proto.tensors import DTYPES, item_size
from hypothesis import strategies as st

from graphkv.terms.capabilities import Capabilities
from graphkv.terms.catalogue import (
    BUDGETS,
    COMBINES,
    GRANULARITIES,
    OPTIONS,
    OUTPUTS,
    POOLINGS,
    SCORERS,
    SIGNALS,
    SIMILARITIES,
    UPDATES,
)
from graphkv.terms.errors import InvalidInputError
from graphkv.terms.needs import check_outputs
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
    """Whatever fits together: what each budget, granularity and unit of pages forbids is not drawn beside it."""
    scorer, budget = draw(named(SCORERS)), draw(named(BUDGETS))
    if budget == "cake" and scorer == "given":
        budget = "uniform"
    shares = [name for name in sorted(GRANULARITIES) if budget == "uniform" or name != "model"]
    granularity = "head" if budget == "adaptive_heads" else draw(st.sampled_from(shares))
    pages = "neither" if budget == "adaptive_heads" else draw(st.sampled_from(["neither", "page_size", "page_align"]))
    own = {name for name, terms in OPTIONS.items() if terms.of in (("scorer", scorer), ("budget_allocation", budget))}
    return Policy(
        draw(st.integers(1, MOST) | st.floats(0.0, 1.0, exclude_min=True)),
        scorer=scorer,
        budget_allocation=budget,
        window=draw(st.integers(1, MOST) if budget == "cake" else st.none() | st.integers(1, MOST)),
        pool_width=draw(st.none() | st.integers(0, 511).map(lambda half: 2 * half + 1)),
        pooling=draw(named(POOLINGS)),
        sinks=draw(st.none() | st.integers(0, MOST)),
        granularity=granularity,
        combine=draw(named(COMBINES)),
        graph=draw(st.none() | graphs().filter(lambda graph: granularity == "head" or graph.signal != "evict")),
        options={name: draw(st.floats(OPTIONS[name].least, OPTIONS[name].most)) for name in own if draw(st.booleans())},
        **({} if pages == "neither" else {pages: draw(st.integers(1, MOST))}),
    )


def _gives(policy: Policy, output: str) -> bool:
    try:
        return check_outputs(policy, [output]) == (output,)
    except InvalidInputError:
        return False


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
    kv_heads, policy = draw(st.integers(1, 2**20)), draw(policies())
    largest = draw(st.integers(0, MOST // 2))
    return Header(
        policy=policy,
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
        outputs=tuple(name for name in OUTPUTS if _gives(policy, name) and draw(st.booleans())),
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
    """Rectangular, ragged (with rows of no tokens too) or shared, of tokens or pages, with outputs; in numpy."""
    wanted = draw(st.lists(named(OUTPUTS), unique=True, max_size=2))
    by_token = not {"updated_scores", "keep_mask", "decay_factors", "choice_order"}.isdisjoint(wanted)
    num_tokens = draw(st.integers(1, 20 if by_token else 2**31 - 1))
    granularity = draw(named(GRANULARITIES))
    page_size = draw(st.none() | st.integers(1, 2**40))
    heads = draw(st.integers(1, 5)) if granularity == "head" else 1
    count = -(-num_tokens // (page_size or 1))
    slots = st.integers(0, count - 1)
    if draw(st.booleans()) and granularity == "head":
        rows: Any = [np.array(sorted(draw(st.lists(slots, max_size=7, unique=True))), np.int32) for _ in range(heads)]
    else:
        width = draw(st.integers(0, min(7, count)))
        row = st.lists(slots, min_size=width, max_size=width, unique=True).map(sorted)
        rows = np.array([draw(row) for _ in range(heads)], np.int32).reshape(heads, width)
    return LayerSelection(
        layer=draw(st.integers(0, MOST)),
        indices=rows if granularity == "head" else rows[0],
        num_tokens=num_tokens,
        kept_score_ratio=draw(shares),
        changed=draw(st.integers(0, MOST)),
        importance=draw(named(SCORERS) | st.just("scores")),
        fingerprint=draw(st.text("0123456789abcdef", min_size=16, max_size=16)),
        prompt=draw(st.integers(0, MOST)),
        exact=draw(st.booleans()),
        granularity=granularity,
        page_size=page_size,
        outputs={name: draw(_output(name, heads, num_tokens, shared=granularity != "head")) for name in wanted},
    )


@st.composite
def _output(draw: st.DrawFn, name: str, heads: int, tokens: int, *, shared: bool) -> Any:
    """One output as it may be, by its shape and dtype."""
    if name in ("dropped_ranges", "moves"):
        row, token = st.integers(0, heads - 1), st.integers(0, tokens - 1)
        triples = draw(
            st.lists(st.tuples(row, st.lists(token, min_size=2, max_size=2).map(sorted)), max_size=min(4, heads * tokens))
        )
        if name == "moves":
            return np.array([(head, last, first) for head, (first, last) in triples], np.int32).reshape(-1, 3)
        return np.array([(head, first, last + 1) for head, (first, last) in triples], np.int32).reshape(-1, 3)
    width = draw(st.integers(0, tokens)) if name == "choice_order" else tokens
    kinds: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
        "keep_mask": (np.bool_, st.booleans()),
        "choice_order": (np.int32, st.integers(-1, tokens - 1)),
    }
    dtype, number = kinds.get(name, (np.float32, st.floats(width=32, allow_nan=False)))
    array = np.array([[draw(number) for _ in range(width)] for _ in range(heads)], dtype).reshape(heads, width)
    return array[0] if shared else array


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
        outputs=some(OUTPUTS),
    )
