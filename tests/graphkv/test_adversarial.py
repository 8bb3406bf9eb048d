"""graphkv.select where numbers are at their worst: scores and norms of sixty orders of magnitude, denormals, ties everywhere,
runs of padding; judged by the same rule as any other case."""

import dataclasses

import numpy as np
import pytest
import torch
from graphkv_testing.cases import Case, Spec
from graphkv_testing.rule import judge_selection

from graphkv import select

ONE_SHOT = (("neighbors", "auto"), ("threshold", 0.0), ("candidates", None))
GRAPHS = {
    "base": None,
    "default": (),
    "paper": ONE_SHOT,
    "strength-0.5": (*ONE_SHOT, ("strength", 0.5)),
    "additive": (*ONE_SHOT, ("update", "additive"), ("strength", 0.5)),
    "enhance": (*ONE_SHOT, ("signal", "enhance"), ("rounds", 3)),
    "evict": (*ONE_SHOT, ("signal", "evict")),
    "sequential": (("update", "sequential"), ("strength", 0.1), ("candidates", 2)),
    "sequential-full": (("update", "sequential"), ("candidates", None)),
}
SHARED = {
    "head": (),
    "layer": (("granularity", "layer"),),
    "layer-max": (("granularity", "layer"), ("combine", "max")),
    "model": (("granularity", "model"),),
    "pages": (("page_size", 3),),
    "pages-max": (("page_size", 3), ("combine", "max")),
    "layer-pages": (("granularity", "layer"), ("page_size", 3)),
    "adaptive": (("budget_allocation", "adaptive_heads"),),
}
SCORES = (
    "wide",
    "wide-mixed",
    "denormal",
    "denormal-mixed",
    "largest",
    "equal",
    "equal-negative",
    "runs",
    "one-of-all",
    "zeros-signed",
)
KEYS = ("wide-norms", "tiny", "large", "equal", "nearly-equal", "opposite")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scores_of(kind, shape, rng):
    """float32, [Hkv, n]; every number is one that a caller's float32 array can hold."""
    powers = 10.0 ** rng.uniform(-30, 30, size=shape)
    signs = rng.choice([-1.0, 1.0], size=shape)
    made = {
        "wide": lambda: powers,
        "wide-mixed": lambda: powers * signs,
        "denormal": lambda: rng.integers(0, 40, size=shape) * 2.0**-149,
        "denormal-mixed": lambda: rng.integers(1, 4000, size=shape) * 2.0**-149 * signs,
        "largest": lambda: rng.uniform(0.5, 1.0, size=shape) * np.finfo(np.float32).max,
        "equal": lambda: np.full(shape, 0.1),
        "equal-negative": lambda: np.full(shape, -0.1),
        "runs": lambda: np.where(np.arange(shape[-1]) // 7 % 2 == np.arange(shape[0])[:, None] % 2, -np.inf, rng.random(shape)),
        "one-of-all": lambda: np.where(np.arange(shape[-1]) == 17, 1.0, -np.inf) * np.ones(shape),
        "zeros-signed": lambda: rng.choice([0.0, -0.0], size=shape),
    }
    return torch.from_numpy(made[kind]()).to(torch.float32)


def keys_of(kind, keys, rng):
    """Float64 keys of a case, [Hkv, n, d], bent."""
    unit = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-9)
    norms = 10.0 ** rng.uniform(-20, 4, size=(*keys.shape[:2], 1))
    made = {
        "wide-norms": lambda: unit * norms,
        "tiny": lambda: unit * 1e-20,
        "large": lambda: unit * rng.uniform(300.0, 10_000.0, size=norms.shape),
        "equal": lambda: np.broadcast_to(keys[:, :1], keys.shape),
        "nearly-equal": lambda: keys[:, :1] * (1 + 2.0**-9 * rng.normal(size=keys.shape)),
        "opposite": lambda: keys[:, :1] * rng.choice([-1.0, 1.0], size=norms.shape),
    }
    return made[kind]()


def assert_right(case):
    for verdict in judge_selection(case.states(), select(**case.inputs(), outputs=case.outputs)):
        assert verdict.ok, f"{case.spec.id}\n{verdict.describe()}"


def case_of(graph, shared, *, seed, policy=(("scorer", "given"),), **fields):
    layers = 2 if shared == "model" else 1
    own = Spec(tokens=47, kv_heads=3, layers=layers, seed=seed, graph=GRAPHS[graph], **fields)
    return Case(dataclasses.replace(own, policy=(("budget", 14), *policy, *SHARED[shared])))


def allowed():
    """Every graph with heads of their own; every way to share with the graphs that differ there."""
    pairs = [(graph, "head") for graph in GRAPHS]
    pairs += [(graph, shared) for shared in SHARED if shared != "head" for graph in ("base", "strength-0.5", "sequential")]
    return [*pairs, ("evict", "pages"), ("enhance", "layer"), ("sequential-full", "adaptive")]


@pytest.mark.parametrize(("graph", "shared"), allowed())
@pytest.mark.parametrize("kind", SCORES)
def test_scores(kind, graph, shared):
    case, rng = case_of(graph, shared, seed=0, importance="scores"), np.random.default_rng(5)
    case.arrays["scores"] = [scores_of(kind, tuple(layer.shape), rng) for layer in case.arrays["scores"]]
    assert_right(case)


@pytest.mark.parametrize(
    ("graph", "shared"),
    [("base", "head"), ("paper", "head"), ("sequential", "head"), ("strength-0.5", "layer"), ("sequential", "adaptive")],
)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize(("scorer", "importance"), [("snapkv", "attention"), ("knorm", "none"), ("keydiff", "none")])
def test_keys(scorer, importance, kind, dtype, graph, shared):
    policy = (("scorer", scorer), ("window", 2))
    case = case_of(graph, shared, seed=1, dtype=dtype, importance=importance, policy=policy, keys="duplicated")
    rng = np.random.default_rng(7)
    bent = [keys_of(kind, layer.double().numpy(), rng) for layer in case.arrays["keys"]]
    case.arrays["keys"] = [
        torch.from_numpy(np.array(keys)).to(layer.dtype) for keys, layer in zip(bent, case.arrays["keys"], strict=True)
    ]
    assert all(torch.isfinite(layer).all() for layer in case.arrays["keys"])
    assert_right(case)
