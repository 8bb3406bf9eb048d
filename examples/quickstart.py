"""Which tokens of a KV cache to keep, asked of a running service: `graphkv-serve`, then `python examples/quickstart.py`.

The keys here are random; a model's prefill gives real ones. An address other than 127.0.0.1:50051 may be given.
"""

import sys

import numpy as np
from graphkv_client import CompressClient, Policy, Rope

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
rng = np.random.default_rng(0)
keys = rng.standard_normal((4, 2, 1000, 64), dtype=np.float32)  # [L, Hkv, n, d], after rotary embedding
queries = rng.standard_normal((4, 6, 32, 64), dtype=np.float32)  # [L, Hq, w, d]: of the last 32 tokens
rope = Rope(inv_freq=tuple(10_000 ** (-i / 32) for i in range(32)), rotary_dim=64)  # Rope.from_config(model.config)

with CompressClient(address) as client:
    kept = client.select(keys, queries=queries, policy=Policy.sequential(budget=128), rope=rope)
for layer in kept:
    heads, tokens = layer.indices.shape
    print(f"layer {layer.layer}: {heads} KV heads keep {tokens} of {layer.num_tokens} tokens, {layer.changed} by the graph")
