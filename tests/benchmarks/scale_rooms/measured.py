"""What one call takes a replica: measured on a real server of this machine, one call at a time."""

import platform

import numpy as np
from graphkv_client import CompressClient, Policy, Selection
from graphkv_testing.process import serve

__all__ = ["measured"]


def measured(calls: int, *, tokens: tuple[int, ...] = (512, 1024, 2048, 4096)) -> tuple[list[float], int, str]:
    """Seconds of each call at the server, the bytes of a mean one, and where.

    One layer of 8 KV heads of 128, lengths in turn: what differs between calls is what the simulation draws from.
    """
    rng = np.random.default_rng(0)
    prompts = [
        (
            rng.standard_normal((1, 8, count, 128), dtype=np.float32).astype(np.float16),
            rng.standard_normal((1, 32, 32, 128), dtype=np.float32).astype(np.float16),
        )
        for count in tokens
    ]
    seconds, sizes = [], []
    with serve("--device", "cpu") as server, CompressClient(server.address) as client:
        for number in range(-len(prompts), calls):
            keys, queries = prompts[number % len(prompts)]
            kept = client.select(keys, queries=queries, policy=Policy(256))
            if number >= 0 and isinstance(kept, Selection):
                seconds.append(kept.summary.seconds["total"])
                sizes.append(kept.summary.sent_bytes)
    return seconds, sum(sizes) // len(sizes), f"{platform.machine()}, CPU"
