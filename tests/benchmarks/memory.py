"""Memory at full size: callers send prompts far larger than `--max-bytes-in-flight`, and the server's resident memory is watched.

usage: ./dev bench memory [--bound 512] [--callers 3] [--tokens 32768] [--layers 32]

Each caller sends one Llama-3-8B shaped prompt whole (8 KV heads of 128, float16, 2 GiB at 32k tokens), without torch on its
side, so that every byte passes through the server. Prints the bound, the resident memory before and at its highest, and
what a prompt whose largest layer is above the bound is told.
"""

import argparse
import threading
import time

import numpy as np
from graphkv_client import CompressClient, GraphKVError, InvalidInputError, Policy
from graphkv_testing.process import Server, serve

MIB = 2**20
ALLOWED = 400 * MIB


def prompt(tokens: int, layers: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """One layer's arrays, given for every layer: the caller's own memory is not what is measured."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((8, tokens, 128), dtype=np.float32).astype(np.float16)
    queries = rng.standard_normal((32, 32, 128), dtype=np.float32).astype(np.float16)
    return [keys] * layers, [queries] * layers


class Watch:
    """The server's resident memory, sampled until `stop`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._ended = threading.Event()
        self.highest = self.start = server.rss()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._ended.wait(0.02):
            self.highest = max(self.highest, self._server.rss())

    def stop(self) -> None:
        """Ends the sampling."""
        self._ended.set()
        self._thread.join()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bound", type=int, default=512, help="--max-bytes-in-flight, in MiB")
    parser.add_argument("--callers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=32)
    given = parser.parse_args()
    keys, queries = prompt(given.tokens, given.layers)
    whole = sum(layer.nbytes for layer in keys)
    with serve("--max-bytes-in-flight", f"{given.bound * MIB}") as server:
        watch, failures = Watch(server), []

        def call() -> None:
            try:
                with CompressClient(server.address, timeout=600.0) as client:
                    client.select(keys, queries=queries, policy=Policy(512))
            except GraphKVError as error:
                failures.append(error)

        started = time.perf_counter()
        threads = [threading.Thread(target=call) for _ in range(given.callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        watch.stop()
        server.settled()
        left = server.metric("graphkv_in_flight_bytes")
        with CompressClient(server.address) as client:
            wide = int(given.bound * MIB / (8 * 128 * 2)) + 1
            try:
                client.select(np.zeros((1, 8, wide, 128), np.float16), queries=[queries[0]], policy=Policy(512))
                refusal = "not refused"
            except InvalidInputError as error:
                refusal = f"{error.reason}: {error}"
    for failure in failures:
        print(f"failed: {failure.reason}: {failure}")
    over = watch.highest - given.bound * MIB
    print(f"{given.callers} callers, {whole / MIB:.0f} MiB each, {seconds:.1f} s, {len(failures)} failures")
    print(f"{'bound (max bytes in flight)':<34} {given.bound:>8} MiB")
    print(f"{'resident before':<34} {watch.start / MIB:>8.0f} MiB")
    print(f"{'resident at its highest':<34} {watch.highest / MIB:>8.0f} MiB")
    print(f"{'above the bound':<34} {over / MIB:>8.0f} MiB   ({ALLOWED // MIB} allowed)")
    print(f"{'in flight afterwards':<34} {left:>8.0f} bytes")
    print(f"a layer above the bound: {refusal}")


if __name__ == "__main__":
    main()
