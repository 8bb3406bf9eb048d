"""What choosing tokens costs, and what the graph is worth: real models, real texts, every method on the same prompts.

usage: ./dev bench quality [--quick | --full] [--models smollm2 gemma3] [--device cuda] [--json FILE] [--plot FILE.png]

In-process (`graphkv.select`; the service gives the same answer). One prefill a prompt, shared by all methods; differences to
the base are paired, with 95% bootstrap intervals over prompts. Everything follows from --seed. --quick takes minutes on
two cores, --full is for a GPU, where the choices of all layers are made together (the same ones: a test shows it).
--from FILE... prints the tables of earlier runs' JSON again, --pool of several seeds as one. What it found: docs/quality.md.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # docs/performance.md says why; before torch is loaded

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch
from quality_rooms import plot
from quality_rooms.methods import BASES, graph_of
from quality_rooms.models import MODELS, load
from quality_rooms.report import Run, tables
from quality_rooms.running import Settings, run
from quality_rooms.tasks import TASKS, Reader

QUICK = {"bases": ["snapkv", "pyramidkv"], "prompts": 3, "budgets": [64, 128], "continuation": 64, "minutes": 7.0}
FULL = {"bases": list(BASES), "prompts": 100, "budgets": [64, 128, 256], "continuation": 64}


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=f"{QUICK} (the default)")
    size.add_argument("--full", action="store_true", help=f"{FULL}")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--bases", nargs="+", choices=BASES)
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="GRAPH", help='further ones: "default strength=0.5 threshold=0.95"'
    )
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt")
    parser.add_argument("--prompts", type=int, help="a task")
    parser.add_argument("--budgets", type=int, nargs="+")
    parser.add_argument("--continuation", type=int, help="tokens of a document that are predicted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="of the model")
    parser.add_argument("--choose-on", help="the device that chooses; default: the model's")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="a model; ends with the prompts that were done by then")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--plot-base", choices=BASES, default="snapkv")
    parser.add_argument("--from", dest="earlier", type=Path, nargs="+", metavar="FILE", help="runs nothing")
    parser.add_argument("--pool", action="store_true", help="runs of one model, with other seeds, are taken together")
    given = parser.parse_args()
    for graph in given.also:
        graph_of(graph)  # refused here rather than by a process
    for name, value in (FULL if given.full else QUICK).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def machine(device: str) -> str:
    """What the model ran on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores {platform.machine()}"


def measured(given: argparse.Namespace, name: str) -> Run:
    """One model's run."""
    loaded = load(name, given.device, lambda text: print(text, file=sys.stderr))
    reader = Reader(loaded.tokenizer, num_tokens=given.tokens, continuation=given.continuation, seed=given.seed)
    cases = [case for task in given.tasks for case in reader.cases(task, given.prompts)]
    choosing = given.choose_on or given.device
    settings = Settings(name, given.device, choosing, tuple(given.bases), tuple(given.also), tuple(given.budgets), given.seed)
    started = time.perf_counter()
    records = run(settings, loaded, cases, given.processes, given.minutes)
    about = {
        "model": name,
        "machine": machine(given.device),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "prompts a task": len({record.prompt for record in records}),
        "tokens": given.tokens,
        "continuation": given.continuation,
        "seed": given.seed,
        "seconds": round(time.perf_counter() - started),
    }
    return Run(about, records)


def main() -> None:
    """Runs, prints, writes."""
    given = arguments()
    if given.plot:
        plot.require()
    if given.earlier:
        runs = [Run.from_json(found) for file in given.earlier for found in json.loads(file.read_text())["runs"]]
    else:
        runs = [measured(given, name) for name in given.models]
    if given.pool:
        runs = [
            Run.pooled([own for own in runs if own.about["model"] == name]) for name in {run.about["model"]: 0 for run in runs}
        ]
    for found in runs:
        print("\n".join(tables(found)))
    if given.json:
        given.json.write_text(json.dumps({"runs": [found.to_json() for found in runs]}, separators=(",", ":")))
    if given.plot:
        plot.draw(runs, given.plot_base, given.plot)


if __name__ == "__main__":
    main()
