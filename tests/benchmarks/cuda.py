"""How long `graphkv.select` takes in-process for one Llama-3-8B prompt, with the device memory it needs beside the keys.

usage: ./dev bench cuda [--device cuda] [--tokens 32768] [--layers 32] [--budget 512]

The chunked path, which any device runs. A base method alone stands beside the policies, so that the price of the graph
shows.
"""

import argparse
import statistics
import time

import torch

import graphkv
from graphkv import Policy, Rope


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(given.device)
    keys = torch.randn(given.layers, 8, given.tokens, 128, dtype=torch.bfloat16, device=device)
    queries = torch.randn(given.layers, 32, 32, 128, dtype=torch.bfloat16, device=device)
    rope = Rope(tuple(500000.0 ** (-i / 64) for i in range(64)), 128)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}: {given.layers} layers x 8 KV heads, n {given.tokens}, d 128, bf16, B {given.budget}"
    )
    print(f"{'policy':<12} {'median':>10} {'fastest':>10} {'memory':>12}")
    policies = {
        "snapkv": Policy.snapkv(given.budget),
        "default": Policy(given.budget),
        "paper": Policy.paper(given.budget),
        "sequential": Policy.sequential(given.budget),
    }
    for label, policy in policies.items():
        seconds = []
        for _ in range(given.repeat + 1):
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            start = time.perf_counter()
            graphkv.select(keys, queries=queries, policy=policy, rope=rope)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else float("nan")
        median, fastest = statistics.median(seconds[1:]), min(seconds[1:])  # the first one loads libraries
        print(f"{label:<12} {median * 1e3:>7.0f} ms {fastest * 1e3:>7.0f} ms {extra:>8.0f} MiB")


if __name__ == "__main__":
    main()
