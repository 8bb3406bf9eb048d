"""What happens to the fleet, one thing after the other, each until all is as before: a killed process is replaced, a frozen
one named again, an update through. Never is the last healthy replica taken.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from chaos_rooms.fleet import ServedFleet, waited
from chaos_rooms.hanging import hang_file
from chaos_rooms.tally import Fault

__all__ = ["Director", "plan"]

_LONG = 180.0
"""Seconds after which something is held not to recover."""


def plan(kills: int, at_once: int, updates: int, freezes: int, hangs: int, seed: int) -> list[str]:
    """The names of what happens, in a random order; without Ray's head is last, because it does not come back."""
    rest = kills - 1 if kills > 1 else kills  # one dies without the head
    bursts = ["kill"] * (rest // at_once) + ["kill one"] * (rest % at_once)
    steps = [*bursts, *["freeze"] * freezes, *["hang"] * hangs, "controller", "proxy", "scale"]
    steps += ["update"] * (updates - 1) + ["broken update"] if updates > 1 else ["update"] * updates
    random.Random(seed).shuffle(steps)
    return [*steps, "head"] if kills > 1 else steps


class Director:
    """Does what a plan says. `faults`: what happened."""

    def __init__(self, fleet: ServedFleet, folder: Path, replicas: int, at_once: int, seed: int, said: Callable[[str], None]):
        self._fleet = fleet
        self._folder = folder
        self._replicas = replicas
        self._at_once = at_once
        self._random = random.Random(seed)
        self._said = said
        self._version = 0
        self.faults: list[Fault] = []
        self.kills = 0

    def whole(self, seconds: float = _LONG) -> bool:
        """Waits until as many replicas are named as there should be, and no other starts or drains."""
        size = self._replicas
        return waited(lambda: len(self._fleet.named()) == size == len(self._fleet.pids()), seconds) is not None

    def do(self, step: str) -> None:
        """One step of the plan."""
        steps: dict[str, Callable[[], None]] = {
            "kill": lambda: self._kill(self._at_once),
            "kill one": lambda: self._kill(1),
            "freeze": lambda: self._held("replica frozen for 10 s", _freeze),
            "hang": lambda: self._held("engine hangs for 10 s", self._hang),
            "controller": lambda: self._process("Serve's controller killed", "ray::ServeController"),
            "proxy": lambda: self._process("Serve's proxy killed", "ray::ProxyActor"),
            "update": self._update,
            "broken update": self._broken,
            "scale": self._scale,
            "head": self._head,
        }
        steps[step]()

    def _noted(self, fault: Fault) -> None:
        fault.until = max(fault.until, time.monotonic() if fault.kind.endswith(("update", "up", "down")) else fault.until)
        self.faults.append(fault)
        out = "" if fault.out_after is None else f", out of rotation after {fault.out_after:.1f} s"
        back = "not as before" if fault.recovered_after is None else f"as before after {fault.recovered_after:.1f} s"
        self._said(f"{fault.kind}{out}, {fault.note or back}")

    def _victims(self, number: int) -> dict[str, int]:
        """Replicas by name, never all that are healthy."""
        self.whole()
        found = self._fleet.processes()
        number = min(number, len(found) - 1)
        return {name: found[name] for name in self._random.sample(sorted(found), max(0, number))}

    def _kill(self, number: int, *, kind: str = "replica killed", replaced: bool = True) -> None:
        victims = self._victims(number)
        faults = []
        for pid in victims.values():
            os.kill(pid, signal.SIGKILL)
            now = time.monotonic()
            faults.append(Fault(kind, now, now))
            self.kills += 1
        names = set(victims)
        out = waited(lambda: not names & set(self._fleet.named(names)), 30, 0.1)
        whole = waited(lambda: len(self._fleet.named(names)) == self._replicas, _LONG) if replaced else None
        for fault in faults:
            fault.out_after = out
            if replaced and out is not None and whole is not None:
                fault.recovered_after = out + whole
            elif not replaced:
                fault.note = "stays dead: nobody replaces it"
            self._noted(fault)

    def _held(self, kind: str, hold: Callable[[int], Callable[[], None]]) -> None:
        """A replica that is held for ten seconds and let go; it should be out meanwhile, and itself come back."""
        for name, pid in self._victims(1).items():
            release = hold(pid)
            start = time.monotonic()
            try:
                out = waited(lambda name=name: name not in self._fleet.named({name}), 10, 0.1)
                time.sleep(max(0.0, start + 10 - time.monotonic()))
            finally:
                release()
            end = time.monotonic()
            back = waited(lambda name=name: name in self._fleet.named({name}), 60, 0.1)
            self._noted(Fault(kind, start, end, out, back, "" if back is not None else "was replaced, or is lost"))
        self.whole()

    def _hang(self, pid: int) -> Callable[[], None]:
        file = hang_file(self._folder, pid)
        file.touch()
        return lambda: file.unlink(missing_ok=True)

    def _process(self, kind: str, title: str) -> None:
        """A process of Serve's that Ray starts anew."""
        victims = self._fleet.pids(title)[:1]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
            start = time.monotonic()
            back = waited(lambda pid=pid: bool(set(self._fleet.pids(title)) - {pid}), _LONG)
            self._noted(Fault(kind, start, start, None, back))
        waited(lambda: self._fleet.status() == "RUNNING", _LONG, 1.0)
        self.whole()

    def _deployed(self, kind: str, replicas: int, done: Callable[[], bool], **settings: object) -> None:
        start = time.monotonic()
        self._fleet.deploy(replicas, **settings)
        took = waited(done, _LONG, 1.0)
        self._noted(Fault(kind, start, time.monotonic(), None, None if took is None else time.monotonic() - start))

    def _current(self) -> dict[str, object]:
        return {"queue_timeout": 10 + self._version}

    def _update(self) -> None:
        before = set(self._fleet.named())
        self._version += 1

        def through() -> bool:
            now = set(self._fleet.named())
            return len(now) == self._replicas and not now & before

        self._deployed("rolling update", self._replicas, through, **self._current())

    def _broken(self) -> None:
        """An update whose replicas cannot start, until Serve gives it up; then what ran before is deployed again."""
        failed = ("UNHEALTHY", "DEPLOY_FAILED")
        self._deployed("broken update", self._replicas, lambda: self._fleet.status() in failed, device="cuda:9")
        self._deployed("put right after a broken update", self._replicas, self._running, **self._current())

    def _running(self) -> bool:
        return self._fleet.status() == "RUNNING" and len(self._fleet.named()) == self._replicas

    def _scale(self) -> None:
        size = self._replicas
        for kind, number in (("scaled up", size + 1), ("scaled down", size)):
            self._replicas = number
            self._deployed(kind, number, self._running, **self._current())

    def _head(self) -> None:
        start = time.monotonic()
        self._fleet.head_dies()
        time.sleep(5.0)
        note = "stays away" if set(self._fleet.named()) else "nobody is named any more"
        self._noted(Fault("Ray's head (GCS) killed", start, start, None, None, note))
        self._kill(1, kind="replica killed without the head", replaced=False)
        time.sleep(5.0)


def _freeze(pid: int) -> Callable[[], None]:
    os.kill(pid, signal.SIGSTOP)
    return lambda: os.kill(pid, signal.SIGCONT)
