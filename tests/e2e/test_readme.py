"""The README's Python runs as it stands there, and prints what it says."""

import re
import subprocess
import sys
from pathlib import Path

from graphkv_testing.process import serve

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_first_example_prints_what_the_readme_says(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL)
    assert found is not None
    program, printed = found[1], found[2]
    assert "127.0.0.1:50051" in program
    with serve() as server:
        program = program.replace("127.0.0.1:50051", server.address)
        ran = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == printed


def test_the_first_line_says_what_it_is() -> None:
    assert README.splitlines()[0].startswith("graphkv chooses which tokens of a KV cache to keep")
