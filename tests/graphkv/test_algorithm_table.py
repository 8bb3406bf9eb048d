"""The table at the end of docs/algorithm.md has no dangling name, and no name that a policy can have is missing from it."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from graphkv.terms import catalogue
from graphkv.terms.policy import Graph, Policy

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SECTION = (ROOT / "docs" / "algorithm.md").read_text().split("## Which test holds what")[1]
ROWS = [line.strip("| ").split(" | ") for line in SECTION.splitlines() if line.startswith("| ")][1:]
NAMES = sorted(
    {name for _, tests in ROWS for name in re.findall(r"`(.+?)`", tests)} | set(re.findall(r"`(\S+::\S+?)`", SECTION))
)


def functions(file: str) -> set[str]:
    tree = ast.parse((HERE / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.fixture(scope="module")
def collected() -> list[str]:
    """The ids of all tests in files of which the table names parameters, as pytest finds them."""
    files = sorted({str(HERE / name.split("::")[0]) for name in NAMES if "[" in name})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100)
    return [line.split("/")[-1] for line in ran.stdout.splitlines() if "::" in line]


def test_the_table_is_read() -> None:
    assert len(ROWS) > 50
    assert all(len(row) == 2 and "::test_" in row[1] for row in ROWS), [row for row in ROWS if len(row) != 2]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_is_dangling(name: str) -> None:
    file, test = name.split("::")
    assert test.split("[")[0] in functions(file), f"docs/algorithm.md names {name}, which there is not"


def test_no_parameter_is_dangling(collected: list[str]) -> None:
    """`test[part]` stands for the ids that have that part: `test[a-part-b]`."""
    for name in NAMES:
        if "[" in name:
            test, part = name.removesuffix("]").split("[")
            ids = [found.removeprefix(f"{test}[").removesuffix("]") for found in collected if found.startswith(f"{test}[")]
            assert any(part in (own, *own.split("-")) or own.startswith(f"{part}-") for own in ids), f"{name}: {ids[:5]}"


def test_everything_a_policy_can_name_has_its_row() -> None:
    rows = " ".join(first for first, _ in ROWS)
    kinds = {
        "scorer": catalogue.SCORERS, "budget": catalogue.BUDGETS, "granularity": catalogue.GRANULARITIES,
        "combine": catalogue.COMBINES, "output": catalogue.OUTPUTS,
    }  # fmt: skip
    wanted = {f"{kind} `{name}`" for kind, table in kinds.items() for name in table}
    wanted |= {
        f"`{name}`"
        for table in (catalogue.SIGNALS, catalogue.UPDATES, catalogue.SIMILARITIES, catalogue.OPTIONS)
        for name in table
    }
    wanted |= {f"field `{field.name}`" for kind in (Policy, Graph) for field in dataclasses.fields(kind)}
    assert sorted(name for name in wanted if name not in rows) == []


@pytest.mark.parametrize("file", ["test_algorithm_rows.py", "test_coarse_rows.py", "test_shared_budgets.py"])
def test_every_test_of_a_row_stands_in_the_table(file: str) -> None:
    named = {name.split("::")[1].split("[")[0] for name in NAMES if name.startswith(file)}
    assert functions(file) == named
