"""A record as one HTML file: the data packed into it, the style and the script inlined, nothing fetched from anywhere.

Numbers travel as zlib-compressed planes of bytes in base64. What repeats is said once: policies that score alike share
their scores, candidates are the first of the tokens sorted by score, and of a source's neighbors only as many are listed
as there is room for (their number is always told).
"""

import base64
import html
import json
import re
import zlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from graphkv.inspector.record import MOST_NEIGHBORS, Floats, PolicyRecord, RowRecord
from graphkv.terms.errors import Reason, invalid

__all__ = ["write_page"]

MOST_BYTES = 4_900_000  # of the page; below 5 MiB
MOST_TOKENS = 65_535  # token ids are 16 bits wide
_LISTED = (MOST_NEIGHBORS, 16, 12, 8, 6, 4, 3, 2, 1)

Words = npt.NDArray[np.uint16]


def write_page(
    tokens: Sequence[str], records: Sequence[PolicyRecord], *, title: str = "prompt", layers: Sequence[int] | None = None
) -> str:
    """The page of one or two policies' records of one prompt.

    tokens: the text of each of its n tokens. layers: the model's own numbers of the layers, default 0, 1, 2, ...
    Raises InvalidInputError where they do not fit together, or the prompt is longer than 65,535 tokens.
    """
    if len(records) not in (1, 2):
        raise invalid("records", f"{len(records)} of them", "one or two", reason=Reason.BAD_SHAPE)
    for entry in records:
        if entry.num_tokens != len(tokens):
            raise invalid("tokens", len(tokens), f"{entry.num_tokens} texts, as the record has", reason=Reason.BAD_SHAPE)
        if (len(entry.layers), len(entry.rows)) != (len(records[0].layers), len(records[0].rows)):
            raise invalid("records", "of different layers or heads", "of one prompt", reason=Reason.BAD_SHAPE)
    numbers = list(range(len(records[0].layers)) if layers is None else layers)
    if len(numbers) != len(records[0].layers):
        raise invalid("layers", numbers, f"{len(records[0].layers)} numbers", reason=Reason.BAD_SHAPE)
    if len(tokens) > MOST_TOKENS:
        raise invalid("tokens", len(tokens), f"at most {MOST_TOKENS}", reason=Reason.TOO_LARGE)
    page = ""
    for listed in _LISTED:
        page = _page(embedded(tokens, records, title=title, layers=numbers, listed=listed), title)
        if len(page.encode()) <= MOST_BYTES:
            break
    return page


def embedded(
    tokens: Sequence[str], records: Sequence[PolicyRecord], *, title: str, layers: Sequence[int], listed: int
) -> dict[str, Any]:
    """What the page holds, as JSON values; each source lists at most `listed` neighbors."""
    sets, own = _score_sets(records)
    return {
        "title": title,
        "tokens": list(tokens),
        "layers": len(layers),
        "layerNumbers": list(layers),
        "heads": len(records[0].layers[0].rows),
        "listed": listed,
        "scores": [_scores(merged) for merged in sets],
        "policies": [_policy(entry, place, listed) for entry, place in zip(records, own, strict=True)],
    }


def _score_sets(records: Sequence[PolicyRecord]) -> tuple[list[Floats], list[int]]:
    """The different base scores, float32 [rows, n], and which of them each record has.

    Policies with one scorer may differ in what they always keep, which has no score: what one lacks the other has.
    """
    scores = [np.stack([row.scores for row in entry.rows]) for entry in records]
    if len(scores) == 1:
        return scores, [0]
    first, second = scores
    both = ~(np.isnan(first) | np.isnan(second))
    if not np.array_equal(first[both], second[both]):
        return scores, [0, 1]
    return [np.where(np.isnan(first), second, first)], [0, 0]


def _scores(scores: Floats) -> dict[str, str]:
    """Per row the tokens by score, best first (ties: the lower index), those without one last; and the scores in that order."""
    order = np.argsort(-scores, axis=1, kind="stable")  # NaN goes last
    ranked = np.take_along_axis(scores, order, axis=1)
    return {"order": packed(order), "ranked": packed(bfloat16(ranked))}


def _policy(entry: PolicyRecord, scores: int, listed: int) -> dict[str, Any]:
    rows = entry.rows
    neighbors = [_listed(row, listed) for row in rows]
    return {
        "name": entry.name,
        "fingerprint": entry.policy.fingerprint,
        "policy": entry.policy.to_dict(),
        "scores": scores,
        "budgets": [layer.budget for layer in entry.layers],
        "always": [layer.always for layer in entry.layers],
        "ratios": [round(layer.kept_score_ratio, 4) for layer in entry.layers],
        "changed": [layer.changed for layer in entry.layers],
        "shifts": [row.shift for row in rows],
        "candidates": [len(row.candidates) for row in rows],
        "sources": [len(row.sources) for row in rows],
        "kept": base64.b64encode(zlib.compress(np.packbits(np.stack([row.kept for row in rows])).tobytes(), 9)).decode(),
        "factors": packed(bfloat16(np.concatenate([row.factors for row in rows]))),
        "sourceTokens": packed(np.concatenate([row.sources for row in rows])),
        "neighborCounts": packed(np.concatenate([row.neighbors.counts for row in rows])),
        "neighborTokens": packed(np.concatenate([tokens for tokens, _ in neighbors])),
        "similarities": packed(np.concatenate([np.rint(similarity * 65535) for _, similarity in neighbors])),
    }


def _listed(row: RowRecord, most: int) -> tuple[npt.NDArray[np.int32], Floats]:
    """The neighbors that are shown, source after source; each has min(most, its count) of them."""
    tokens, similarity = row.neighbors.tokens[:, :most], row.neighbors.similarity[:, :most]
    return tokens[tokens >= 0], similarity[tokens >= 0]


def bfloat16(values: Floats) -> Words:
    """uint16: the upper half of each float32, rounded to the nearest; within 1/256 of the value."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def packed(values: npt.NDArray[Any]) -> str:
    """Whole numbers below 2^16 as base64: all lower bytes, then all upper bytes, zlib-compressed."""
    planes = values.astype("<u2").reshape(-1).view(np.uint8).reshape(-1, 2).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def _page(data: dict[str, Any], title: str) -> str:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # no tag can end the script
    files = resources.files("graphkv.inspector")
    parts = {f"/*{name}*/": files.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "record.js", "page.js")}
    parts |= {"{title}": html.escape(title), "{data}": text}
    frame = files.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], frame)
