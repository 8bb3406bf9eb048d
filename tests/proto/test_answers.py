"""Layer answers, summaries and capabilities: round trips, and answers that cannot be read."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from graphkv_proto import messages
from graphkv_proto import v1 as pb
from graphkv_testing.wire import capabilities, selections, summaries
from hypothesis import given

from graphkv.terms.capabilities import Capabilities
from graphkv.terms.errors import InternalError, InvalidInputError
from graphkv.terms.selection import LayerSelection, Summary

RECTANGULAR = LayerSelection(
    layer=4,
    indices=np.array([[0, 3, 16], [1, 2, 9]], np.int32),
    num_tokens=17,
    kept_score_ratio=0.75,
    changed=2,
    importance="snapkv",
    fingerprint="0123456789abcdef",
)
RAGGED = replace(RECTANGULAR, indices=[np.array(row, np.int32) for row in ([5], [], [0, 1, 16])])


def sent(selection: LayerSelection) -> pb.LayerAnswer:
    return pb.LayerAnswer.FromString(messages.write_layer(selection).SerializeToString())


def same(got: LayerSelection, given: LayerSelection) -> bool:
    ragged = isinstance(given.indices, list)
    assert isinstance(got.indices, list) == ragged
    if not ragged:
        assert got.indices.shape == given.indices.shape
    for row, expected in zip(got.indices, given.indices, strict=True):
        assert row.dtype == np.int32
        np.testing.assert_array_equal(row, expected)
    return replace(got, indices=None) == replace(given, indices=None)


@given(selections())
def test_any_answer_crosses_unchanged(selection: LayerSelection) -> None:
    assert same(messages.read_layer(sent(selection)), selection)


def test_indices_are_little_endian_int32_that_a_caller_may_change() -> None:
    message = sent(RECTANGULAR)
    assert message.values == np.array([0, 3, 16, 1, 2, 9], "<i4").tobytes()
    assert (message.rows, message.offsets) == (2, b"")
    got = messages.read_layer(message).indices
    got += 1
    assert got.flags.writeable


def test_indices_of_other_kinds_are_written_alike() -> None:
    for kind in (np.int64, ">i4", "<i4"):
        assert messages.write_layer(replace(RECTANGULAR, indices=RECTANGULAR.indices.astype(kind))) == sent(RECTANGULAR)
    strided = np.asfortranarray(RECTANGULAR.indices)
    assert messages.write_layer(replace(RECTANGULAR, indices=strided)) == sent(RECTANGULAR)


def test_the_callers_own_scores_have_no_scorer() -> None:
    message = sent(replace(RECTANGULAR, importance="scores"))
    assert (message.importance, message.scorer) == (pb.IMPORTANCE_CALLER, pb.SCORER_UNSPECIFIED)


def test_an_importance_that_is_none_cannot_be_written() -> None:
    with pytest.raises(InvalidInputError, match="importance is 'h3o'"):
        messages.write_layer(replace(RECTANGULAR, importance="h3o"))


def setting(**fields: object) -> Callable[[pb.LayerAnswer], None]:
    def bend(message: pb.LayerAnswer) -> None:
        for name, value in fields.items():
            setattr(message, name, np.array(value, "<i4").tobytes() if isinstance(value, list) else value)

    return bend


BAD: dict[str, tuple[LayerSelection, Callable[[pb.LayerAnswer], None]]] = {
    "pages": (RECTANGULAR, setting(unit=pb.UNIT_PAGE)),
    "unit 0": (RECTANGULAR, setting(unit=0)),
    "unit 999": (RECTANGULAR, setting(unit=999)),
    "importance 999": (RECTANGULAR, setting(importance=999)),
    "scorer 999": (RECTANGULAR, setting(scorer=999)),
    "no scorer": (RECTANGULAR, setting(scorer=0)),
    "prompt -1": (RECTANGULAR, setting(prompt=-1)),
    "layer -1": (RECTANGULAR, setting(layer=-1)),
    "no rows": (RECTANGULAR, setting(rows=0)),
    "2^62 rows": (RECTANGULAR, setting(rows=2**62)),
    "2^62 rows of nothing": (RECTANGULAR, setting(rows=2**62, values=[])),
    "no tokens": (RECTANGULAR, setting(num_tokens=0)),
    "values cut": (RECTANGULAR, setting(values=b"\0" * 23)),
    "a value too few": (RECTANGULAR, setting(values=[0, 3, 16, 1, 2])),
    "n": (RECTANGULAR, setting(values=[0, 3, 17, 1, 2, 9])),
    "below 0": (RECTANGULAR, setting(values=[-1, 3, 16, 1, 2, 9])),
    "twice": (RECTANGULAR, setting(values=[3, 3, 16, 1, 2, 9])),
    "descending": (RECTANGULAR, setting(values=[0, 3, 16, 1, 9, 2])),
    "int32's ends": (RECTANGULAR, setting(values=[2**31 - 1, -(2**31), 16, 1, 2, 9])),
    "offsets cut": (RAGGED, setting(offsets=b"\0" * 15)),
    "offsets too few": (RAGGED, setting(offsets=[0, 1, 4])),
    "offsets from 1": (RAGGED, setting(offsets=[1, 1, 1, 4])),
    "offsets to too far": (RAGGED, setting(offsets=[0, 1, 1, 5])),
    "offsets falling": (RAGGED, setting(offsets=[0, 3, 1, 4])),
    "offsets beyond": (RAGGED, setting(offsets=[0, 2**31 - 1, 1, 4])),
    "offsets negative": (RAGGED, setting(offsets=[0, -5, 1, 4])),
    "a row that falls": (RAGGED, setting(values=[5, 1, 0, 16])),
    "a fall at no row's end": (RAGGED, setting(offsets=[0, 0, 0, 4])),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_cannot_be_applied_is_the_servers_mistake(name: str) -> None:
    selection, bend = BAD[name]
    message = sent(selection)
    bend(message)
    with pytest.raises(InternalError, match="the server's answer cannot be read"):
        messages.read_layer(message)


@pytest.mark.parametrize("rows", [[[], [3]], [[3], []], [[], []], [[], [9, 16], [], [0]]], ids=str)
def test_rows_without_tokens(rows: list[list[int]]) -> None:
    selection = replace(RAGGED, indices=[np.array(row, np.int32) for row in rows])
    assert same(messages.read_layer(sent(selection)), selection)


@given(summaries)
def test_any_summary_crosses_unchanged(summary: Summary) -> None:
    assert messages.read_summary(pb.Summary.FromString(messages.write_summary(summary).SerializeToString())) == summary


def test_a_summary_in_process_never_crosses() -> None:
    with pytest.raises(InvalidInputError, match=r"summary\.transport is 'in_process'"):
        messages.write_summary(Summary())


@pytest.mark.parametrize("field", ["encoding", "transport"])
@pytest.mark.parametrize("number", [0, 999])
def test_a_summary_that_cannot_be_read(field: str, number: int) -> None:
    message = messages.write_summary(Summary(transport="tcp"))
    setattr(message, field, number)
    with pytest.raises(InternalError, match=rf"summary\.{field}"):
        messages.read_summary(message)


@given(capabilities())
def test_any_capabilities_cross_unchanged(given: Capabilities) -> None:
    data = messages.write_capabilities(given).SerializeToString()
    assert messages.read_capabilities(pb.GetCapabilitiesResponse.FromString(data)) == given


def test_names_of_a_newer_server_are_skipped() -> None:
    message = pb.GetCapabilitiesResponse(
        scorers=[999, pb.SCORER_CAKE, 0], max_bytes_in_flight=1, max_message_bytes=1, chunk_bytes=1
    )
    assert messages.read_capabilities(message).scorers == ("cake",)


@pytest.mark.parametrize("limit", ["max_bytes_in_flight", "max_message_bytes", "chunk_bytes"])
@pytest.mark.parametrize("value", [0, -1])
def test_capabilities_within_which_nothing_can_be_sent(limit: str, value: int) -> None:
    message = pb.GetCapabilitiesResponse(max_bytes_in_flight=1, max_message_bytes=1, chunk_bytes=1)
    setattr(message, limit, value)
    with pytest.raises(InternalError, match=limit):
        messages.read_capabilities(message)


def test_asking_for_capabilities_says_the_minor_version() -> None:
    assert messages.write_capabilities_request().minor == messages.MINOR
