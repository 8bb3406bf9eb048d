"""LayerSelection and Summary as messages and back.

An answer that cannot be read is the server's mistake, not the caller's: InternalError. Indices are checked here, once:
whoever gathers with them, perhaps on a GPU, can trust that they are ascending slots (or pages) of the prompt.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from graphkv.terms.errors import InvalidInputError
from graphkv.terms.policy import Policy
from graphkv.terms.selection import LayerSelection, Summary
from graphkv_proto import v1 as pb
from graphkv_proto.messages import _names as names
from graphkv_proto.messages._outputs import read_outputs, unreadable, write_outputs

__all__ = ["read_layer", "read_summary", "write_layer", "write_summary"]

_CALLER = "scores"
"""What `LayerSelection.importance` says where the caller's own scores were used."""
_MAX_ROWS = 2**16
"""No model has as many KV heads; rows without tokens could be any number."""
Indices = npt.NDArray[np.int32]


def write_layer(selection: LayerSelection) -> pb.LayerAnswer:
    """`selection.indices`: integers [rows, B], a list of rows of any lengths, or [B] where rows share the answer; these and
    `selection.outputs` numpy, or torch on the CPU. Raises InvalidInputError where an output or the importance is none.
    """
    offsets = b""
    if isinstance(selection.indices, list):
        offsets = np.cumsum([0, *(len(row) for row in selection.indices)]).astype("<i4").tobytes()
        values = b"".join(np.asarray(row, "<i4").tobytes() for row in selection.indices)
    else:
        values = np.asarray(selection.indices, "<i4").tobytes()
    shared = selection.granularity != "head"
    own = selection.importance == _CALLER
    return pb.LayerAnswer(
        prompt=selection.prompt,
        layer=selection.layer,
        rows=1 if shared else len(selection.indices),
        values=values,
        offsets=offsets,
        unit=pb.UNIT_TOKEN if selection.page_size is None else pb.UNIT_PAGE,
        num_tokens=selection.num_tokens,
        fingerprint=selection.fingerprint,
        exact=selection.exact,
        importance=pb.IMPORTANCE_CALLER if own else pb.IMPORTANCE_SCORER,
        scorer=None if own else names.SCORER.label(selection.importance, "importance"),
        kept_score_ratio=selection.kept_score_ratio,
        changed=selection.changed,
        outputs=write_outputs(selection.outputs, shared=shared),
    )


def read_layer(message: pb.LayerAnswer, *, policy: Policy) -> LayerSelection:
    """The answer to a call with this policy, in numpy: indices int32 [rows, B], a list of rows where they differ in length,
    or [B] where the policy has rows share the answer; outputs by name, whichever came.

    Raises InternalError where it is none: a unit or rows that the policy does not ask for, indices that are no ascending
    slots or pages, outputs that are not what they are called.
    """
    shared, unit = policy.granularity != "head", "token" if policy.page_size is None else "page"
    try:
        names.UNIT.read(message.unit, "unit", (unit,))
        caller = names.IMPORTANCE.read(message.importance, "importance") == "caller"
        importance = _CALLER if caller else names.SCORER.read(message.scorer, "scorer")
    except InvalidInputError as error:
        raise unreadable(error.message) from None
    rows = 1 if shared else _MAX_ROWS
    if message.prompt < 0 or message.layer < 0 or not 1 <= message.rows <= rows or message.num_tokens < 1:
        sizes = f"prompt {message.prompt}, layer {message.layer}, rows {message.rows}, num_tokens {message.num_tokens}"
        raise unreadable(f"its sizes are {sizes}")
    if shared and message.offsets:
        raise unreadable("it has offsets, but one row")
    outputs = read_outputs(message.outputs, rows=message.rows, num_tokens=message.num_tokens, shared=shared)
    indices = _indices(message, -(-message.num_tokens // (policy.page_size or 1)), unit)
    return LayerSelection(
        layer=message.layer,
        indices=indices[0] if shared else indices,
        num_tokens=message.num_tokens,
        kept_score_ratio=message.kept_score_ratio,
        changed=message.changed,
        importance=importance,
        fingerprint=message.fingerprint,
        prompt=message.prompt,
        exact=message.exact,
        granularity=policy.granularity,
        page_size=policy.page_size,
        outputs=outputs,
    )


def write_summary(summary: Summary) -> pb.Summary:
    """Raises InvalidInputError where the encoding or the transport is none of the wire."""
    return pb.Summary(
        request_id=summary.request_id,
        seconds=summary.seconds,
        received_bytes=summary.sent_bytes,
        encoding=names.ENCODING.label(summary.encoding, "summary.encoding"),
        transport=names.TRANSPORT.label(summary.transport, "summary.transport"),
        replica=summary.where,
    )


def read_summary(message: pb.Summary) -> Summary:
    """Raises InternalError where it names an encoding or a transport that the caller cannot have used."""
    try:
        encoding = names.ENCODING.read(message.encoding, "summary.encoding")
        transport = names.TRANSPORT.read(message.transport, "summary.transport")
    except InvalidInputError as error:
        raise unreadable(error.message) from None
    return Summary(
        request_id=message.request_id,
        sent_bytes=message.received_bytes,
        encoding=encoding,
        transport=transport,
        where=message.replica,
        seconds=dict(message.seconds),
    )


def _indices(message: pb.LayerAnswer, slots: int, unit: str) -> Indices | list[Indices]:
    """Rows of ascending numbers below `slots`."""
    values, rows = _integers("values", message.values), message.rows
    if message.offsets:
        offsets = _integers("offsets", message.offsets)
        if len(offsets) != rows + 1 or offsets[0] or offsets[-1] != len(values) or bool((np.diff(offsets) < 0).any()):
            raise unreadable(f"its offsets do not cut {len(values)} values into {rows} rows")
        starts = offsets[1:-1]
    else:
        if len(values) % rows:
            raise unreadable(f"its {len(values)} values are no {rows} rows of equal length")
        starts = np.arange(1, rows) * (len(values) // rows)
    climbs = np.diff(values) > 0
    inner = starts[(starts > 0) & (starts < len(values))]
    climbs[inner - 1] = True  # from one row to the next they may fall
    if len(values) and (values.min() < 0 or values.max() >= slots or not climbs.all()):
        raise unreadable(f"its values are no ascending {unit}s below {slots}")
    return np.split(values, starts) if message.offsets else values.reshape(rows, -1)


def _integers(name: str, data: bytes) -> Any:
    if len(data) % 4:
        raise unreadable(f"its {name} are {len(data)} bytes, no whole number of int32")
    return np.frombuffer(data, "<i4").astype(np.int32)  # a copy: what a caller gets must be writable
