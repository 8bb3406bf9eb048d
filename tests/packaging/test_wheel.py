"""The built wheel alone, with the light client's dependencies and nothing else, selects against a real server."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from graphkv_testing.process import serve

ROOT = Path(__file__).parents[2]
LIGHT = {
    "grpcio",
    "protobuf",
    "numpy",
    "google-crc32c",
    "googleapis-common-protos",
    "typing-extensions",
    "graphkv",
    "pip",
    "setuptools",
}
PROGRAM = """
import sys
import numpy as np
import graphkv, graphkv_client
from graphkv_client import CompressClient, Policy

address, site = sys.argv[1:]
assert graphkv.__file__.startswith(site), graphkv.__file__
assert graphkv_client.__file__.startswith(site), graphkv_client.__file__
rng = np.random.default_rng(0)
keys = rng.standard_normal((2, 3, 401, 16), dtype=np.float32)
queries = rng.standard_normal((2, 6, 32, 16), dtype=np.float32)
with CompressClient(address) as client:
    kept = client.select(keys, queries=queries, policy=Policy(budget=64))
    assert client.capabilities().version == graphkv.__version__
assert [rows.shape for rows in kept.indices] == [(3, 64)] * 2
assert all(isinstance(rows, np.ndarray) for rows in kept.indices)
heavy = {"torch", "ray", "graphkv_server", "prometheus_client", "triton", "transformers"} & set(sys.modules)
assert not heavy, heavy
print("light", kept.indices[0][0, :3].tolist())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    return next(folder.glob("graphkv-*.whl"))


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {"graphkv", "graphkv_proto", "graphkv_client", "graphkv_server"} == {
        name for name in top if ".dist-info" not in name
    }
    for package in ("graphkv", "graphkv_proto", "graphkv_client", "graphkv_server"):
        assert f"{package}/py.typed" in names
    assert any(name.endswith("compression.proto") for name in names)
    assert {f"graphkv/inspector/{name}" for name in ("page.html", "page.css", "page.js", "record.js")} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.timeout(300)
def test_the_light_client_selects(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "a venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", str(wheel)], check=True)
    listed = subprocess.run([*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True)
    installed = {line.split("==")[0].lower().replace("_", "-") for line in listed.stdout.splitlines()}
    assert installed <= LIGHT, installed - LIGHT
    with serve() as running:
        command = [str(python), "-P", "-c", PROGRAM, running.address, str(venv)]
        answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("light")
