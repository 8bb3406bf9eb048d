"""One caller, a process without torch: calls one after the other, every answer compared, until its standard input ends.

`python -m chaos_rooms.caller ADDRESS NUMBER FOLDER PAUSE TIMEOUT`. Writes a line of JSON for each call to FOLDER/NUMBER.calls:
[start, end, attempts, where, error], in seconds of the system's monotonic clock; error is "" or what the caller saw.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from graphkv_client import CompressClient, GraphKVError, Selection, Summary

from chaos_rooms.prompts import Asked, read

__all__: list[str] = []


def whole(client: CompressClient, given: dict[str, Any]) -> tuple[list[Any], Summary]:
    """All at once."""
    chosen = client.select(**given)
    assert isinstance(chosen, Selection)
    return list(chosen.indices), chosen.summary


def streamed(client: CompressClient, given: dict[str, Any]) -> tuple[list[Any], Summary]:
    """Layer after layer, as a prefill makes them."""
    with client.stream(num_layers=len(given["keys"]), policy=given["policy"]) as stream:
        for layer, (keys, queries) in enumerate(zip(given["keys"], given["queries"], strict=True)):
            stream.put(layer, keys=keys, queries=queries)
            time.sleep(0.02)
        layers = sorted(stream, key=lambda one: one.layer)
        assert stream.summary is not None
        return [one.indices for one in layers], stream.summary


def called(client: CompressClient, asked: Asked, way: Any) -> tuple[int, str, str]:
    """How often one call was sent, who answered, and what went wrong."""
    given, right = asked
    try:
        indices, summary = way(client, given)
    except GraphKVError as error:
        return 0, "", repr(error)
    same = len(indices) == len(right) and all(np.array_equal(own, other) for own, other in zip(indices, right, strict=True))
    return summary.attempts, summary.where, "" if same else "another answer"


def main() -> None:
    """Calls until told to stop."""
    address, number, folder, pause, timeout = sys.argv[1:]
    prompts = read(Path(folder))
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    with CompressClient(address, timeout=float(timeout)) as client, open(Path(folder) / f"{number}.calls", "w") as calls:
        turn = int(number)
        while not stop.wait(float(pause)):
            way = streamed if turn % 3 == 0 else whole
            start = time.monotonic()
            attempts, where, error = called(client, prompts[turn % len(prompts)], way)
            print(json.dumps([start, time.monotonic(), attempts, where, error]), file=calls, flush=True)
            turn += 1


if __name__ == "__main__":
    main()
