"""Makes the message classes from the contract, beside it: a *_pb2.py and a *_pb2.pyi for each *.proto.

Run by a Python with grpcio-tools 1.63.2 (the oldest that works: its output runs on protobuf 5.26 and everything newer),
or named one by --python. There is no *_pb2_grpc.py: `graphkv_proto.service` is the RPC table.
"""

import argparse
import difflib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CONTRACT = tuple(f"graphkv_proto/v1/{name}" for name in ("policy", "select", "compression"))
GENERATED = tuple(f"{name}_pb2{suffix}" for name in CONTRACT for suffix in (".py", ".pyi"))
FROZEN = ROOT / "frozen.binpb"
TOOLS = "1.63.2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Generates, checks or freezes; the exit status is 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help=f"a Python with grpcio-tools=={TOOLS} (default: this one)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the checked-in files are not these")
    parser.add_argument("--freeze", action="store_true", help=f"also write {FROZEN.name}, which `buf breaking` compares with")
    buf = ROOT.parent / ".venv/bin/buf"
    parser.add_argument("--buf", default=str(buf) if buf.exists() else "buf", help="the buf to freeze with (PyPI: buf-bin)")
    options = parser.parse_args(arguments)
    check_tools(options.python)
    if options.check:
        return check(options.python)
    generate(options.python, ROOT)
    if options.freeze:
        freeze(options.buf)
    return 0


def check_tools(python: str) -> None:
    """Ends the program unless `python` has the one version whose output is checked in."""
    version = "import importlib.metadata as m; print(m.version('grpcio-tools'))"
    found = subprocess.run([python, "-c", version], capture_output=True, text=True, check=False)  # noqa: S603  # as asked
    if found.stdout.strip() != TOOLS:
        sys.exit(f"{python} has grpcio-tools {found.stdout.strip() or 'not installed'}; pip install grpcio-tools=={TOOLS}")


def generate(python: str, folder: Path) -> None:
    """Writes the generated files under `folder`, which imports them as graphkv_proto.v1."""
    command = [python, "-m", "grpc_tools.protoc", f"--proto_path={ROOT}", f"--python_out={folder}", f"--pyi_out={folder}"]
    subprocess.run([*command, *(f"{name}.proto" for name in CONTRACT)], check=True)  # noqa: S603  # the caller's own Python


def check(python: str) -> int:
    """Generates elsewhere and compares; prints what differs."""
    with tempfile.TemporaryDirectory() as made:
        generate(python, Path(made))
        stale = [name for name in GENERATED if not same(ROOT / name, Path(made) / name)]
    if stale:
        print(f"Not what the contract gives: {', '.join(stale)}. Run ./dev gen and commit the result.", file=sys.stderr)
    return 1 if stale else 0


def same(kept: Path, made: Path) -> bool:
    """Whether two files are equal; prints the first lines that are not."""
    old = kept.read_text().splitlines(keepends=True) if kept.exists() else []
    new = made.read_text().splitlines(keepends=True)
    difference = list(difflib.unified_diff(old, new, f"{kept.name} (checked in)", f"{made.name} (generated)"))
    sys.stderr.writelines(line[:200].rstrip("\n") + "\n" for line in difference[:20])
    return not difference


def freeze(buf: str) -> None:
    """Writes the image of the contract as it is now: from here on, `buf breaking` refuses what v1 callers would not survive."""
    command = [buf, "build", str(ROOT), "--exclude-source-info", "--output", str(FROZEN)]
    subprocess.run(command, check=True)  # noqa: S603  # the caller's own buf


if __name__ == "__main__":
    sys.exit(main())
