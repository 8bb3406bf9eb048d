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
from graphkv.terms.policy import Policy
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


SHARED = replace(RECTANGULAR, indices=np.array([0, 3, 16], np.int32), granularity="layer")
PAGES = replace(SHARED, indices=np.array([0, 2], np.int32), page_size=8)
FULL = replace(
    RECTANGULAR,
    outputs={
        "updated_scores": np.linspace(-1, 1, 34, dtype=np.float32).reshape(2, 17),
        "keep_mask": np.arange(34).reshape(2, 17) % 3 == 0,
        "decay_factors": np.ones((2, 17), np.float32),
        "choice_order": np.array([[16, 0, -1], [9, 2, 1]], np.int32),
        "dropped_ranges": np.array([[0, 1, 3], [1, 3, 17]], np.int32),
        "moves": np.array([[0, 3, 1]], np.int32),
    },
)


def sent(selection: LayerSelection) -> pb.LayerAnswer:
    return pb.LayerAnswer.FromString(messages.write_layer(selection).SerializeToString())


def read(message: pb.LayerAnswer, selection: LayerSelection = RECTANGULAR) -> LayerSelection:
    """As the caller does whose policy asked for an answer such as this selection."""
    return messages.read_layer(message, policy=Policy(3, granularity=selection.granularity, page_size=selection.page_size))


def same(got: LayerSelection, given: LayerSelection) -> bool:
    ragged = isinstance(given.indices, list)
    assert isinstance(got.indices, list) == ragged
    if not ragged:
        assert got.indices.shape == given.indices.shape
    for row, expected in zip(got.rows, given.rows, strict=True):
        assert row.dtype == np.int32
        np.testing.assert_array_equal(row, expected)
    assert list(got.outputs) == list(given.outputs)
    for name, array in given.outputs.items():
        assert got.outputs[name].dtype == array.dtype
        assert got.outputs[name].flags.writeable
        np.testing.assert_array_equal(got.outputs[name], array, strict=True)
    return replace(got, indices=None, outputs={}) == replace(given, indices=None, outputs={})


@given(selections())
def test_any_answer_crosses_unchanged(selection: LayerSelection) -> None:
    assert same(read(sent(selection), selection), selection)


def test_outputs_are_written_as_the_contract_says() -> None:
    written = {each.output: (each.dtype, list(each.dims), len(each.data)) for each in sent(FULL).outputs}
    assert written == {
        pb.OUTPUT_UPDATED_SCORES: (pb.DTYPE_F32, [2, 17], 136),
        pb.OUTPUT_KEEP_MASK: (pb.DTYPE_I8, [2, 17], 34),
        pb.OUTPUT_DECAY_FACTORS: (pb.DTYPE_F32, [2, 17], 136),
        pb.OUTPUT_CHOICE_ORDER: (pb.DTYPE_I32, [2, 3], 24),
        pb.OUTPUT_DROPPED_RANGES: (pb.DTYPE_I32, [2, 3], 24),
        pb.OUTPUT_MOVES: (pb.DTYPE_I32, [1, 3], 12),
    }
    assert same(read(sent(FULL)), FULL)


def test_a_shared_answer_is_one_row() -> None:
    given = replace(PAGES, outputs={"keep_mask": np.arange(17) % 2 == 0, "moves": np.zeros((0, 3), np.int32)})
    message = sent(given)
    assert (message.rows, message.unit, message.values) == (1, pb.UNIT_PAGE, np.array([0, 2], "<i4").tobytes())
    assert [list(each.dims) for each in message.outputs] == [[1, 17], [0, 3]]
    assert same(read(message, PAGES), given)


def test_an_output_that_is_none_cannot_be_written() -> None:
    with pytest.raises(InvalidInputError, match="outputs"):
        messages.write_layer(replace(RECTANGULAR, outputs={"thoughts": np.zeros(1)}))


def test_indices_are_little_endian_int32_that_a_caller_may_change() -> None:
    message = sent(RECTANGULAR)
    assert message.values == np.array([0, 3, 16, 1, 2, 9], "<i4").tobytes()
    assert (message.rows, message.offsets) == (2, b"")
    got = read(message).indices
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
    "tokens for pages": (PAGES, setting(unit=pb.UNIT_TOKEN)),
    "a page beyond the last": (PAGES, setting(values=[0, 3])),
    "two rows for a layer": (SHARED, setting(rows=2, values=[0, 3, 9, 16])),
    "offsets for a layer": (SHARED, setting(offsets=[0, 3])),
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
        read(message, selection)


def output(kind: int, **fields: object) -> Callable[[pb.LayerAnswer], None]:
    def bend(message: pb.LayerAnswer) -> None:
        (own,) = (each for each in message.outputs if each.output == kind)
        for name, value in fields.items():
            if name == "dims":
                own.dims[:] = value  # type: ignore[assignment]
            else:
                setattr(own, name, np.array(value, "<i4").tobytes() if isinstance(value, list) else value)

    return bend


BAD_OUTPUTS: dict[str, Callable[[pb.LayerAnswer], None]] = {
    "999": output(pb.OUTPUT_MOVES, output=999),
    "0": output(pb.OUTPUT_MOVES, output=0),
    "twice": lambda message: message.outputs.append(message.outputs[0]),
    "another dtype": output(pb.OUTPUT_UPDATED_SCORES, dtype=pb.DTYPE_I32),
    "dtype 999": output(pb.OUTPUT_UPDATED_SCORES, dtype=999),
    "bytes cut": output(pb.OUTPUT_UPDATED_SCORES, data=b"\0" * 135),
    "no bytes": output(pb.OUTPUT_DECAY_FACTORS, data=b""),
    "a row too few": output(pb.OUTPUT_DECAY_FACTORS, dims=[1, 17], data=b"\0" * 68),
    "a token too few": output(pb.OUTPUT_DECAY_FACTORS, dims=[2, 16], data=b"\0" * 128),
    "one axis": output(pb.OUTPUT_DECAY_FACTORS, dims=[34]),
    "axes below 0": output(pb.OUTPUT_CHOICE_ORDER, dims=[2, -3]),
    "2^62 by 4": output(pb.OUTPUT_CHOICE_ORDER, dims=[2**62, 4]),
    "2^62 ranges": output(pb.OUTPUT_MOVES, dims=[2**62, 3]),
    "ranges of two": output(pb.OUTPUT_DROPPED_RANGES, dims=[3, 2]),
    "a mask of 2": output(pb.OUTPUT_KEEP_MASK, data=b"\2" * 34),
    "a mask of -1": output(pb.OUTPUT_KEEP_MASK, data=b"\xff" * 34),
    "token n chosen": output(pb.OUTPUT_CHOICE_ORDER, data=[17, 0, 1, 2, 3, 4]),
    "token -2 chosen": output(pb.OUTPUT_CHOICE_ORDER, data=[-2, 0, 1, 2, 3, 4]),
    "row 2 dropped": output(pb.OUTPUT_DROPPED_RANGES, data=[0, 1, 3, 2, 3, 17]),
    "row -1 dropped": output(pb.OUTPUT_DROPPED_RANGES, data=[-1, 1, 3, 1, 3, 17]),
    "dropped beyond n": output(pb.OUTPUT_DROPPED_RANGES, data=[0, 1, 3, 1, 3, 18]),
    "dropped nothing": output(pb.OUTPUT_DROPPED_RANGES, data=[0, 3, 3, 1, 3, 17]),
    "dropped from -1": output(pb.OUTPUT_DROPPED_RANGES, data=[0, -1, 3, 1, 3, 17]),
    "moved from n": output(pb.OUTPUT_MOVES, data=[0, 17, 1]),
    "moved to n": output(pb.OUTPUT_MOVES, data=[0, 3, 17]),
    "moved to -1": output(pb.OUTPUT_MOVES, data=[0, 3, -1]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_an_output_that_is_not_what_it_is_called_is_the_servers_mistake(name: str) -> None:
    message = sent(FULL)
    BAD_OUTPUTS[name](message)
    with pytest.raises(InternalError, match="the server's answer cannot be read"):
        read(message)


@pytest.mark.parametrize("rows", [[[], [3]], [[3], []], [[], []], [[], [9, 16], [], [0]]], ids=str)
def test_rows_without_tokens(rows: list[list[int]]) -> None:
    selection = replace(RAGGED, indices=[np.array(row, np.int32) for row in rows])
    assert same(read(sent(selection)), selection)


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


def test_outputs_are_advertised() -> None:
    message = messages.write_capabilities(Capabilities("", 0, "", "cpu", 1, 1, 1))
    assert list(message.outputs) == list(range(1, 7))


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
