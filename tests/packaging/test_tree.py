"""The tree reads like the plan: short files, a docstring first, no asserts on user input, nothing swallowed."""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("graphkv", "proto/graphkv_proto", "client/graphkv_client", "server/graphkv_server")
NEVER = {"utils", "helpers", "common", "misc", "base", "core", "manager", "handler", "data", "info", "select"}


def sources(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if "_pb2" not in path.name)


PRODUCT = sources(*PACKAGES, "examples")
EVERYTHING = sources(*PACKAGES, "examples", "tests")


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_is_over_400_lines() -> None:
    long = {ids(path): lines for path in EVERYTHING if (lines := len(path.read_text().splitlines())) > 400}
    assert not long


@pytest.mark.parametrize("path", PRODUCT, ids=ids)
def test_a_file_says_what_it_is_for_and_asserts_nothing(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the file's first docstring says what it is for"
    assert path.stem not in NEVER
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: user input raises a typed error"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=ids)
def test_nothing_on_the_wire_can_run_code(path: Path) -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    called = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"eval", "exec"}


def test_the_product_speaks_of_itself_alone() -> None:
    git = shutil.which("git")
    tracked = git and subprocess.run([git, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if not tracked or tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if not path.is_file():  # deleted, and not committed yet
            continue
        if path.suffix in {".py", ".md", ".toml", ".sh", ".proto", ".yaml"} or path.name in {"dev", "run"}:
            text = path.read_text()
            assert str(ROOT) not in text, f"{name} holds a path of one machine"
