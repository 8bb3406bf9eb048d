"""One prompt for every scorer in the catalogue, with all that it needs; tests that walk the catalogue start here."""

from typing import Any

import torch

from graphkv import Graph, Policy
from graphkv.arrays import value_norms
from graphkv.terms.catalogue import SCORERS
from graphkv.terms.needs import query_rows, reads_attention

LAYERS, HEADS, GROUP, DIM, VALUE_DIM = 2, 3, 2, 16, 12


def policy_of(scorer: str, budget: int = 40, **fields: Any) -> Policy:
    """A policy whose graph has something to do on these prompts."""
    return Policy(budget, scorer=scorer, graph=Graph(threshold=0.3), **fields)


def prompt_for(
    scorer: str, tokens: int = 131, *, seed: int = 0, dtype: torch.dtype = torch.float32, policy: Policy | None = None
) -> dict[str, torch.Tensor]:
    """keys and what else the scorer (or its `policy`, which may look further) needs, as `select` takes it: arrays of all
    layers.
    """
    generator = torch.Generator().manual_seed(seed)
    policy, terms = policy or policy_of(scorer), SCORERS[scorer]

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(LAYERS, *dims, generator=generator)

    centers = random(HEADS, 7, DIM)
    choice = torch.randint(7, (LAYERS, HEADS, tokens, 1), generator=generator).expand(-1, -1, -1, DIM)
    inputs = {"keys": centers.gather(2, choice) + 0.4 * random(HEADS, tokens, DIM)}
    if reads_attention(policy):
        rows = query_rows(policy, tokens)
        rows = min(5, tokens) if rows is None else rows
        inputs["queries"] = random(HEADS * GROUP, rows, DIM)
    if "query_mean" in terms.needs:
        spread = random(HEADS * GROUP, DIM, DIM)
        inputs["query_mean"] = random(HEADS * GROUP, DIM)
        inputs["query_covariance"] = spread @ spread.transpose(-1, -2) / DIM
    if "value_norms" in terms.needs:
        inputs["values"] = random(HEADS, tokens, VALUE_DIM)
    if scorer == "given":
        inputs["scores"] = random(HEADS, tokens)
    small = ("keys", "queries", "values")
    return {role: array.to(dtype) if role in small else array for role, array in inputs.items()}


def layer_inputs(inputs: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """One layer's arrays as `graphkv.layer.Layer` takes them: values as their norms."""
    own = {role: array[layer] for role, array in inputs.items()}
    if "values" in own:
        own["value_norms"] = value_norms(own.pop("values"))
    return own
