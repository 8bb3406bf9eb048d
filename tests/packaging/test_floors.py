"""The oldest versions that pyproject.toml allows are versions that work."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())


def allows(requirements: list[str], name: str, version: str) -> bool:
    (own,) = [one for one in map(Requirement, requirements) if one.name == name]
    return own.specifier.contains(version)


@pytest.mark.parametrize(
    "requirements", [PROJECT["build-system"]["requires"], PROJECT["project"]["optional-dependencies"]["test"]]
)
def test_the_builder_knows_license_files(requirements: list[str]) -> None:
    assert not allows(requirements, "hatchling", "1.26.3"), "it refuses `license-files` as a list"
    assert allows(requirements, "hatchling", "1.27.0")


def test_the_checksum_is_compiled_for_every_python_we_name() -> None:
    assert not allows(PROJECT["project"]["dependencies"], "google-crc32c", "1.5.0"), "pure Python, and slow, on 3.12"
