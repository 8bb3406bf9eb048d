"""./dev makes its environments once, whole and for its own folder; Python, pip and the tools are stand-ins here."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = r"""#!/bin/sh
# makes environments of itself and notes what is asked of it
printf '%s\n' "$0 $*" >>"$LOG"
case "$*" in
"-c "*"(3, 13)"*) [ "${FAKE_VERSION:-3.12}" != 3.13 ] ;;
"-m venv "*)
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    [ -z "${FAKE_BROKEN:-}" ] || exit 1
    printf '#!/bin/sh\nexec "%s/bin/python3" "$0"\n' "$3" >"$3/bin/pip"
    chmod +x "$3/bin/pip"
    ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a space in its name and what ./dev reads."""
    folder = tmp_path.resolve() / "a checkout"
    folder.mkdir()
    for name in ("dev", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    return folder


def dev(folder: Path, *arguments: str, status: int = 0, **environment: str) -> tuple[list[str], str]:
    """What the Pythons were asked for, without their folder, and what was said."""
    log = folder / "log"
    log.write_text("")
    own = {**os.environ, "PYTHON": str(folder / "python"), "LOG": str(log), **environment}
    done = subprocess.run(["sh", str(folder / "dev"), *arguments], env=own, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    asked = log.read_text()
    assert all(line.startswith(f"{folder}/") for line in asked.splitlines()), asked
    return asked.replace(f"{folder}/", "").splitlines(), done.stderr


def made(asked: list[str]) -> list[str]:
    return [line.split("-m venv ")[1] for line in asked if "-m venv" in line]


def installed(asked: list[str]) -> int:
    return sum("-m pip install" in line for line in asked)


def test_an_environment_is_made_once(checkout: Path) -> None:
    asked, _ = dev(checkout, "test", "-k", "this")
    assert (made(asked), installed(asked)) == ([".venv"], 2)
    assert asked[-1] == ".venv/bin/python -m pytest -k this"
    assert dev(checkout, "test")[0] == [".venv/bin/python -m pytest"]


@pytest.mark.parametrize("move", [shutil.copytree, shutil.move], ids=["copied", "renamed"])
def test_a_checkout_elsewhere_has_its_own_environment(checkout: Path, move: Callable[..., Any]) -> None:
    dev(checkout, "test")
    elsewhere = checkout.with_name("elsewhere")
    move(checkout, elsewhere)
    asked, _ = dev(elsewhere, "test")
    assert (made(asked), installed(asked)) == ([".venv"], 2)


def test_an_environment_that_could_not_be_made_is_not_kept(checkout: Path) -> None:
    _, said = dev(checkout, "test", status=1, FAKE_BROKEN="yes")
    assert "could not make .venv" in said
    assert not (checkout / ".venv").exists()


def test_half_an_environment_is_made_again(checkout: Path) -> None:
    dev(checkout, "test")
    (checkout / ".venv/bin/pip").unlink()
    assert made(dev(checkout, "test")[0]) == [".venv"]


def test_the_generator_says_which_python_it_needs(checkout: Path) -> None:
    _, said = dev(checkout, "gen", status=2, FAKE_VERSION="3.13")
    assert "Python 3.11 or 3.12" in said
    assert not (checkout / ".venv-gen").exists()
    assert made(dev(checkout, "gen")[0]) == [".venv-gen"]
    dev(checkout, "gen", FAKE_VERSION="3.13")  # it is there already


def test_help_tells_what_lint_does() -> None:
    script = (ROOT / "dev").read_text()
    (told,) = [line for line in script.splitlines() if line.startswith("  lint ")]
    body = script.split("\nlint() {")[1].split("\n}")[0]
    commands = {"ruff": "bin/ruff", "mypy": "bin/mypy", "import floors": "lint-imports", "buf": "bin/buf"}
    commands |= {"generated messages": "generate --check", "file sizes": "test_tree.py"}
    for word, command in commands.items():
        assert word in told
        assert command in body
