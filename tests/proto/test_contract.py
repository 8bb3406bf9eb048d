"""The contract itself: documented, linted, without times of day, and in step with the tables of the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor as MessageDescriptor
from google.protobuf.descriptor import FileDescriptor
from graphkv_proto.encodings import ENCODINGS
from graphkv_proto.messages import _names as names
from graphkv_proto.messages.tensor import AXES
from graphkv_proto.tensors import DTYPES, TOKEN_AXIS
from graphkv_proto.v1 import compression_pb2, policy_pb2, select_pb2

from graphkv.terms import catalogue

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto"
FILES: dict[str, FileDescriptor] = {
    "policy": policy_pb2.DESCRIPTOR,
    "select": select_pb2.DESCRIPTOR,
    "compression": compression_pb2.DESCRIPTOR,
}
DECLARATION = re.compile(r"^ *(?:(?:message|enum|service|rpc|oneof) (\w+)|(?:[\w.<>, ]+ )?(\w+) = \d+;)")


def messages_of(file: FileDescriptor) -> list[MessageDescriptor]:
    return list(file.message_types_by_name.values())


def declared(name: str) -> dict[str, bool]:
    """What the file declares, message and field by name, and whether a comment stands above or beside it."""
    found: dict[str, bool] = {}
    holder, above = "", ""
    for line in (PROTO / f"graphkv_proto/v1/{name}.proto").read_text().splitlines():
        match = DECLARATION.match(line)
        if match and not line.startswith("syntax"):
            word = match[1] or match[2]
            if not line.startswith(" "):
                holder = word
            found[word if word == holder else f"{holder}.{word}"] = above.strip().startswith("//") or "; //" in line
        above = line
    return found


@pytest.mark.parametrize("name", FILES)
def test_everything_has_a_comment(name: str) -> None:
    file, found = FILES[name], declared(name)
    expected = set()
    for message in messages_of(file):
        expected |= {message.name, *(f"{message.name}.{field.name}" for field in message.fields)}
        expected |= {f"{message.name}.{one.name}" for one in message.oneofs if not one.name.startswith("_")}
    for enum in file.enum_types_by_name.values():
        expected |= {enum.name, *(f"{enum.name}.{value.name}" for value in enum.values)}
    for service in file.services_by_name.values():
        expected |= {service.name, *(f"{service.name}.{method.name}" for method in service.methods)}
    assert set(found) == expected
    assert [word for word, commented in found.items() if not commented] == []


def test_no_time_of_day_is_ever_sent() -> None:
    """Clocks differ: deadlines are gRPC's own, and relative; what took how long is in seconds."""
    for file in FILES.values():
        assert not [dependency.name for dependency in file.dependencies if dependency.package != "graphkv.v1"]
        for message in messages_of(file):
            for field in message.fields:
                words = set(field.name.split("_"))
                banned = {"time", "timestamp", "date", "deadline", "expires", "expiry", "epoch", "at", "since", "until", "now"}
                assert not words & banned, f"{message.name}.{field.name}"


def test_every_enum_begins_with_a_value_that_is_nothing() -> None:
    for file in FILES.values():
        for enum in file.enum_types_by_name.values():
            first = enum.values_by_number[0].name
            assert first.endswith("_UNSPECIFIED")
            prefix = first.removesuffix("UNSPECIFIED")
            assert all(value.name.startswith(prefix) for value in enum.values)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (names.SCORER, catalogue.SCORERS),
        (names.BUDGET_ALLOCATION, catalogue.BUDGETS),
        (names.GRANULARITY, catalogue.GRANULARITIES),
        (names.POOLING, catalogue.POOLINGS),
        (names.SIGNAL, catalogue.SIGNALS),
        (names.UPDATE, catalogue.UPDATES),
        (names.SIMILARITY, catalogue.SIMILARITIES),
        (names.COMBINE, catalogue.COMBINES),
        (names.OUTPUT, catalogue.OUTPUTS),
        (names.ENCODING, ENCODINGS),
    ],
    ids=[
        "scorers",
        "budgets",
        "granularities",
        "poolings",
        "signals",
        "updates",
        "similarities",
        "combines",
        "outputs",
        "encodings",
    ],
)
def test_whatever_a_policy_can_name_can_be_sent(table: names.Names, words: dict[str, object]) -> None:
    assert set(words) <= set(table.names)


def test_roles_and_dtypes_are_those_of_the_tables() -> None:
    assert set(names.ROLE.names) == set(AXES)
    assert set(names.DTYPE.names) == set(DTYPES)
    assert set(TOKEN_AXIS) <= set(AXES)
    assert names.LAYOUT.names == ("HND", "NHD")


def test_what_later_versions_fill_is_there() -> None:
    """None of it may need a breaking change."""
    header = select_pb2.Header.DESCRIPTOR.fields_by_name
    assert {"required_features", "fingerprint", "outputs", "priority", "shard", "region_id", "minor"} <= set(header)
    shard = set(select_pb2.Shard.DESCRIPTOR.fields_by_name)
    assert shard == {"group", "generation", "rank", "world", "first_head", "total_heads"}
    assert {"region", "device", "start", "count", "byte_length"} <= set(select_pb2.Descriptor.DESCRIPTOR.fields_by_name)
    assert {"values", "offsets", "unit", "outputs", "exact"} <= set(select_pb2.LayerAnswer.DESCRIPTOR.fields_by_name)


def buf(*arguments: str) -> None:
    program = Path(sys.executable).with_name("buf")
    if not program.exists():
        pytest.skip("buf is not installed (PyPI: buf-bin)")
    ran = subprocess.run([program, *arguments], cwd=PROTO, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [("lint",), ("format", "--diff", "--exit-code"), ("breaking", "--against", "frozen.binpb")],
    ids=["lint", "format", "breaking"],
)
def test_buf_has_nothing_to_say(arguments: tuple[str, ...]) -> None:
    buf(*arguments)
