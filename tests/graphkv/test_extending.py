"""docs/extending.md is true: its scorer, as one file and one line more in a copy of the package, selects as it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import graphkv

GUIDE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(python)?\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as it is, the guide's file and the guide's line."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(Path(graphkv.__file__).parent, folder / "graphkv", ignore=shutil.ignore_patterns("__pycache__"))
    (_, file), (_, line), *_ = BLOCKS
    (folder / "graphkv" / "scorers" / "leverage.py").write_text(file)
    catalogue = folder / "graphkv" / "terms" / "catalogue.py"
    head, table = catalogue.read_text().split("SCORERS: Mapping[str, ScorerTerms] = MappingProxyType({\n")
    catalogue.write_text(f"{head}SCORERS: Mapping[str, ScorerTerms] = MappingProxyType({{\n{line}{table}")
    return folder


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_guides_scorer_selects_as_the_guide_says(extended: Path) -> None:
    assert [kind for kind, _ in BLOCKS] == ["python", "python", "python", ""]
    where = f"import graphkv; assert graphkv.__file__.startswith({str(extended)!r}), graphkv.__file__\n"
    assert run(extended, "-c", where + BLOCKS[2][1]) == BLOCKS[3][1]


def test_the_tests_that_walk_the_catalogue_take_it_in(extended: Path) -> None:
    tests = str(Path(__file__).with_name("test_scorers.py"))
    chosen = "leverage and (threads_and_batches or does_not_read)"
    said = run(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(Path(__file__).parents[2]),
               "-c", str(Path(__file__).parents[2] / "pyproject.toml"), tests, "-k", chosen)  # fmt: skip
    assert re.search(r"[1-9]\d* passed", said), said


def test_the_guides_file_keeps_the_house_rules(extended: Path) -> None:
    ruff = pytest.importorskip("ruff", reason="the lint extra is not installed")
    assert ruff is not None
    file = extended / "graphkv" / "scorers" / "leverage.py"
    config = str(Path(__file__).parents[2] / "pyproject.toml")
    for command in (["check"], ["format", "--check"]):
        run(extended, "-m", "ruff", *command, "--config", config, str(file))
