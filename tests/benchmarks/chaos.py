"""Chaos: replicas of the service in a real Ray cluster on this machine, callers in other processes, and everything that can die.

usage: ./dev bench chaos [--calls 2000] [--callers 8] [--replicas 3] [--kills 20] [--updates 2] [--json FILE]

Kills (SIGKILL) replicas, never the last healthy one, Serve's controller, its proxy, which is the address that callers were
given, and at last Ray's head, the GCS server; freezes replicas for 10 s (SIGSTOP), holds engines for 10 s whose replicas still
answer; updates all replicas, once to what cannot start; adds a replica and takes it away. Callers call all the while, and
compare every answer with the one that was made in this process. Prints what happened and what they saw of it; exits with 1
where a caller saw a failure or another answer, where something did not come back, or where a process, a file or a token is
left. On two cores the full form takes about ten minutes, `--calls 800 --kills 4 --updates 1 --freezes 1 --hangs 1` three.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from chaos_rooms import prompts
from chaos_rooms.callers import Callers, calling
from chaos_rooms.faults import Director, plan
from chaos_rooms.fleet import ServedFleet, ray_head
from chaos_rooms.tally import Tally
from graphkv_testing.cluster import traces
from graphkv_testing.process import wait_until

ROOMS = Path(__file__).resolve().parent


def lived_through(given: argparse.Namespace, folder: Path) -> tuple[Tally, list[str]]:
    """The run; what callers saw, and what is wrong with the run itself."""
    started = time.monotonic()

    def said(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {text}", flush=True)

    wrong: list[str] = []
    with ray_head(cpus=4 * given.replicas) as head:
        fleet = ServedFleet(head, given.grace)
        fleet.deploy(given.replicas)
        director = Director(fleet, folder, given.replicas, given.at_once, given.seed, said)
        if not director.whole():
            raise RuntimeError(f"the replicas did not start: Serve says {fleet.status()}")
        said(f"{given.replicas} replicas serve at {fleet.address}")
        with calling(folder, fleet.address, given.callers, given.pause, given.timeout) as callers:
            wait_until(lambda: callers.number >= 5 * given.callers, 120)
            for step in plan(given.kills, given.at_once, given.updates, given.freezes, given.hangs, given.seed):
                if time.monotonic() - started > given.limit and step != "head":
                    wrong.append(f"over {given.limit:.0f} s: left out {step!r}")
                    continue
                while step == "head" and director.kills < given.kills - 1 and time.monotonic() - started < given.limit:
                    director.do("kill one")  # where fewer were healthy than were to be killed at once
                director.do(step)
            wait_until(lambda: callers.number >= given.calls, max(60.0, given.limit - (time.monotonic() - started)))
            wrong += ended(callers, director, given)
        said("callers ended")
        return Tally(callers.calls, director.faults), wrong


def ended(callers: Callers, director: Director, given: argparse.Namespace) -> list[str]:
    """What did not come to what was asked for."""
    checks = (
        (callers.number >= given.calls, f"{callers.number} calls of {given.calls}"),
        (director.kills >= given.kills, f"{director.kills} kills of {given.kills}"),
        (callers.lost() == 0, f"{callers.lost()} callers ended by themselves"),
    )
    return [text for good, text in checks if not good]


def printed(tally: Tally) -> None:
    """The tables."""
    whole = tally.whole()
    print(
        f"\n{whole['calls']} calls of {whole['callers']} callers, answered by {whole['replicas_that_answered']} replicas: "
        f"{whole['failures']} failures seen by callers; {whole['calls_sent_again']} calls sent again, {whole['sent_again']} times "
        f"({whole['calls_sent_again_without_a_fault']} of them without a fault)"
    )
    print(
        f"a call took p50 {whole['p50'] * 1e3:.0f} ms, p99 {whole['p99'] * 1e3:.0f} ms, at most {whole['most']:.2f} s; "
        f"those sent once p50 {whole['p50_sent_once'] * 1e3:.0f} ms, p99 {whole['p99_sent_once'] * 1e3:.0f} ms\n"
    )
    head = "times", "calls", "without service, p50", "p99", "most", "out after, p50", "most", "as before, p50", "most", "never"
    print(f"{'fault':<34}" + "".join(f"{name:>{len(name) + 2 if len(name) > 5 else 8}}" for name in head))
    for row in whole["rows"]:
        fault, *numbers = row.values()
        widths = [len(name) + 2 if len(name) > 5 else 8 for name in head]
        cells = [f"{own:.2f} s" if isinstance(own, float) else str(own) for own in numbers]
        print(f"{fault:<34}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    print(
        "\ncalls: sent again for the fault. without service: from the fault, or the call's start if later, to the answer. "
        "out after:\nuntil Locate did not name it. as before: until all replicas were named again, or an update was through."
    )


def main() -> int:
    """Runs, prints, and says by its exit status whether callers noticed anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="at least; callers go on as long as something happens")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=3, choices=range(2, 5))
    parser.add_argument("--kills", type=int, default=20, help="of replicas")
    parser.add_argument("--at-once", type=int, default=2, help="how many are killed together")
    parser.add_argument("--updates", type=int, default=2, help="one of them broken, where there are two")
    parser.add_argument("--freezes", type=int, default=2)
    parser.add_argument("--hangs", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.25, help="seconds between two calls of a caller")
    parser.add_argument("--timeout", type=float, default=60.0, help="of a call")
    parser.add_argument("--grace", type=float, default=10.0, help="of a replica that drains")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds after which nothing more happens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also writes everything there")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that blocks are left, and clusters with them
    before = traces()
    folder = Path(tempfile.mkdtemp(prefix="gkv-chaos-", dir="/tmp"))
    os.environ["CHAOS_FOLDER"] = str(folder)
    path = (str(ROOMS), str(ROOMS.parent / "support"), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    try:
        prompts.write(folder)
        tally, wrong = lived_through(given, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wait_until(lambda: traces() == before, 20)
    tally.left = [f"{kind}: {one}" for kind, now in traces().items() for one in now - before[kind]]
    printed(tally)
    wrong += [f"left behind: {one}" for one in tally.left] + [f"a caller saw: {one}" for one in tally.whole()["errors"]]
    wrong += [f"did not recover: {row['fault']}" for row in tally.rows() if row["not_recovered"]]
    if given.json:
        given.json.write_text(json.dumps(tally.whole() | {"wrong": wrong}, indent=1) + "\n")
    print("\n" + ("\n".join(wrong) or "nothing failed, and nothing is left"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
