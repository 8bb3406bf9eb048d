"""What importing the client costs: `./dev bench import`. Fresh interpreters, one after the other, rounds interleaved.

Beside it, in the same rounds: grpc and numpy alone, which any Python client of the service imports. Goal: 1.5 times those.
"""

import argparse
import os
import statistics
import subprocess
import sys

PROGRAMS = {
    "an empty interpreter": "pass",
    "grpc, numpy": "import grpc, numpy",
    "grpc, numpy, protobuf": "import grpc, numpy, google.protobuf.message, google.protobuf.descriptor_pool",
    "graphkv_client": "import graphkv_client",
}
MEASURED = """
import sys, time
started = time.perf_counter()
{program}
print(time.perf_counter() - started, len(sys.modules))
"""


def measure(program: str) -> tuple[float, int]:
    """Seconds of the imports in a fresh interpreter, and how many modules it then holds."""
    command = [sys.executable, "-c", MEASURED.format(program=program)]
    # installed packages have their compiled files beside them, whatever this shell says about writing them
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    seconds, modules = answer.stdout.split()
    return float(seconds), int(modules)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="fresh interpreters for each row (default 9)")
    rounds = parser.parse_args().rounds
    for program in PROGRAMS.values():
        measure(program)  # compiled files and the page cache are warm from here on
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in PROGRAMS}
    for _ in range(rounds):
        for name, program in PROGRAMS.items():
            found[name].append(measure(program))
    base = statistics.median(seconds for seconds, _ in found["grpc, numpy"])
    print(f"{'import':<24}{'median s':>10}{'least s':>10}{'modules':>9}{'times grpc, numpy':>19}")
    for name, runs in found.items():
        times = [seconds for seconds, _ in runs]
        middle = statistics.median(times)
        print(f"{name:<24}{middle:>10.3f}{min(times):>10.3f}{runs[0][1]:>9}{middle / base:>19.2f}")


if __name__ == "__main__":
    main()
