"""The worked example of docs/algorithm.md (the GraphKV paper's figure), as inputs and as the reference's state."""

import numpy as np
import pytest
import torch
from graphkv_testing.reference import select_prompt

from graphkv import Graph, Policy

SCORES = [0.1, 0.6, 0.3, 1.2, 0.3, 0.7, 1.1]
EDGES = {(4, 5): 0.40, (4, 6): 0.50, (7, 3): 0.70, (7, 6): 0.60}  # the figure counts from 1
CHAIN = (3, 7, 6, 4, 5)


@pytest.fixture
def worked_example():
    """A function of the update ("product", "additive"): arguments of `select`, and the reference's layer."""

    def make(update):
        gram = np.eye(7)
        for i, first in enumerate(CHAIN):  # a Markov chain along the edges: the other cosines are products, so smaller
            for k in range(i + 1, len(CHAIN)):
                pairs = zip(CHAIN[i:k], CHAIN[i + 1 : k + 1], strict=True)
                cosine = np.prod([EDGES.get((a, b), EDGES.get((b, a))) for a, b in pairs])
                gram[first - 1, CHAIN[k] - 1] = gram[CHAIN[k] - 1, first - 1] = cosine
        vectors = np.linalg.cholesky(gram).astype(np.float32)  # rows whose cosines are the printed edges
        graph = Graph(source_ratio=0.7, neighbors="auto", threshold=0.0, candidates=None, similarity="pre_rope", update=update)
        policy = Policy(3, scorer="given", graph=graph)
        inputs = {
            "keys": torch.ones(1, 1, 7, 2),
            "scores": torch.tensor(SCORES)[None, None],
            "similarity_keys": torch.from_numpy(vectors)[None, None],
            "policy": policy,
        }
        arrays = {role: value.numpy() for role, value in inputs.items() if role != "policy"}
        return inputs, select_prompt(**arrays, policy=policy)[0]

    return make
