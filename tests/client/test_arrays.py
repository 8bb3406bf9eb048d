"""Arrays of every kind: read without a copy, written as they are, answered in kind."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from graphkv_client import Graph, InvalidInputError, Policy, Rope
from graphkv_client._arrays import answer_like, dtype_name, host_view, norms, read
from graphkv_client._inputs import CallTerms, prompts_of
from graphkv_client._pieces import piece_of

INDICES = np.array([[0, 2], [1, 3]], np.int32)
ANSWERS = {
    "indices": INDICES,
    "scores": np.array([[np.inf, 0.5, -np.inf]], np.float32),
    "mask": np.array([True, False, True]),
    "no moves": np.empty((0, 3), np.int32),
}


class Dlpack:
    """An array library of its own, as far as DLPack goes."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape = array.shape
        self.ndim = len(array.shape)
        self.dtype = array.dtype

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, number = self._array.__dlpack_device__()
        return int(kind), number


class Namespaced(Dlpack):
    """And with a namespace, so that answers can be of its kind."""

    def __array_namespace__(self) -> Any:
        class Namespace:
            @staticmethod
            def from_dlpack(array: Any) -> "Namespaced":
                return Namespaced(array)

        return Namespace


class OnGpu(Dlpack):
    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, Dlpack], ids=["numpy", "torch", "dlpack"])
def test_reading_shares_memory(kind: Any) -> None:
    memory = np.zeros((2, 3), np.float32)
    view = read("keys", kind(memory))
    memory[1, 2] = 5
    assert view.shape == (2, 3)
    assert view[1, 2] == 5


def test_what_is_no_array_is_named() -> None:
    with pytest.raises(InvalidInputError, match="numpy array, a torch tensor or an array with DLPack") as raised:
        read("queries", [[1.0]])
    assert raised.value.argument == "queries"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_bits_of_a_tensor_are_unchanged(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 7, 4).to(dtype)
    view, name = host_view("keys", tensor)
    assert name == dtype_name("keys", tensor)
    again = torch.from_numpy(view.copy()).view(dtype)
    assert torch.equal(again.float(), tensor.float())


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_bits_of_ml_dtypes_are_unchanged(name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).astype(getattr(ml_dtypes, name))
    view, _ = host_view("keys", array)
    assert view.dtype.kind == "u"
    assert view.tobytes() == array.tobytes()
    assert np.shares_memory(view, array)


@pytest.mark.parametrize(("role", "dtype"), [("keys", np.int32), ("keys", np.complex64), ("positions", np.float32)])
def test_a_dtype_that_cannot_be(role: str, dtype: Any) -> None:
    with pytest.raises(InvalidInputError) as raised:
        dtype_name(role, np.zeros((1, 2, 2), dtype))
    assert raised.value.argument == role
    assert raised.value.reason == "BAD_SHAPE"


@pytest.mark.parametrize(
    ("example", "kind"),
    [
        (np.zeros(1), np.ndarray),
        (torch.zeros(1), torch.Tensor),
        (Dlpack(np.zeros(1)), np.ndarray),
        (Namespaced(np.zeros(1)), Namespaced),
    ],
    ids=["numpy", "torch", "dlpack", "dlpack with a namespace"],
)
@pytest.mark.parametrize("array", ANSWERS.values(), ids=ANSWERS)
def test_answers_are_of_the_callers_kind(example: Any, kind: type, array: Any) -> None:
    answered = answer_like(example)(array.copy())
    assert type(answered) is kind
    plain = np.from_dlpack(answered)
    assert plain.dtype == array.dtype
    assert np.array_equal(plain, array)


def test_torch_is_asked_for_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as if not installed
    assert read("keys", Dlpack(np.ones((1, 2), np.float32))).shape == (1, 2)
    with pytest.raises(InvalidInputError, match=r"graphkv\[torch\]") as raised:
        read("keys", OnGpu(np.ones((1, 2), np.float32)))
    assert raised.value.argument == "keys"


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("cut", "layout", "copied"),
    [
        (lambda memory: memory, "HND", False),
        (lambda memory: memory.swapaxes(0, 1), "NHD", False),
        (lambda memory: memory[:, 1:4], "HND", True),
        (lambda memory: memory[:, :, ::2], "HND", True),
    ],
    ids=["heads first", "tokens first", "a range of tokens", "every other number"],
)
def test_pieces_are_in_the_order_of_the_memory(kind: Any, cut: Any, layout: str, copied: bool) -> None:
    memory = np.arange(2 * 5 * 4, dtype=np.float32).reshape(2, 5, 4)
    view = cut(kind(memory))
    piece = piece_of("keys", view)
    assert piece.layout == layout
    assert piece.count == view.shape[1]
    assert piece.array.flags.c_contiguous is not copied
    in_order = piece.array.swapaxes(0, 1) if layout == "NHD" else piece.array
    assert np.array_equal(in_order, np.asarray(view))
    assert np.shares_memory(piece.array, memory)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.float32])
def test_scores_travel_as_float32(dtype: Any) -> None:
    piece = piece_of("scores", np.array([[0.5, -np.inf, 2.0]], dtype))
    assert piece.dtype == "f32"
    assert piece.array.tolist() == [[0.5, -np.inf, 2.0]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_numbers_beyond_float32_become_infinite_without_a_warning(kind: Any) -> None:
    large = kind(np.array([[1e300, -1e300, 1.0]]))
    assert piece_of("scores", large).array.tolist() == [[np.inf, -np.inf, 1.0]]
    assert norms("values", large[None]).tolist() == [[np.inf]]


# --- what a call is made of ---------------------------------------------------------------------------------------------


def call_of(policy: Policy = Policy(9, window=4), *, rope: Rope | None = None, layout: str = "HND", **given: Any) -> Any:  # noqa: B008
    roles = ("keys", "queries", "attention", "scores", "similarity_keys", "positions")
    terms = CallTerms(policy, rope, layout)
    return prompts_of({role: given.get(role) for role in roles}, terms=terms, pinned=given.get("pinned"))


def zeros(*dims: int, dtype: Any = np.float32) -> Any:
    return np.zeros(dims, dtype)


def test_one_array_or_one_a_layer() -> None:
    keys, queries = zeros(3, 2, 21, 8), zeros(3, 4, 4, 8)
    for given in ({"keys": keys, "queries": queries}, {"keys": list(keys), "queries": tuple(queries)}):
        prompts, batched = call_of(**given)
        assert not batched
        assert len(prompts[0].layers) == 3
        assert (prompts[0].layers[0].shapes.query_heads, prompts[0].tokens) == (4, 21)


def test_a_list_of_prompts_is_a_batch() -> None:
    prompts, batched = call_of(
        keys=[zeros(2, 2, 21, 8), list(zeros(2, 2, 5, 8))],
        queries=[zeros(2, 4, 4, 8), zeros(2, 4, 4, 8)],
        pinned=[None, [(1, 3)]],
    )
    assert batched
    assert [(prompt.tokens, prompt.pinned) for prompt in prompts] == [(21, ()), (5, ((1, 3),))]


def test_tokens_first_becomes_heads_first_without_a_copy() -> None:
    keys = zeros(2, 21, 2, 8)
    prompts, _ = call_of(layout="NHD", keys=keys, queries=zeros(2, 4, 4, 8))
    inside = prompts[0].layers[1].arrays["keys"]
    assert inside.shape == (2, 21, 8)
    assert np.shares_memory(inside, keys)


PRE_ROPE = Policy(9, window=4, graph=Graph(similarity="pre_rope"))
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no keys": ({"queries": zeros(2, 4, 4, 8)}, "keys", "BAD_SHAPE"),
    "no prompts": ({"keys": []}, "keys", "BAD_SHAPE"),
    "keys of rank 2": ({"keys": [zeros(21, 8)], "queries": [zeros(4, 4, 8)]}, "keys", "BAD_SHAPE"),
    "no tokens": ({"keys": zeros(2, 2, 0, 8), "queries": zeros(2, 4, 4, 8)}, "tokens", "BAD_SHAPE"),
    "heads do not divide": ({"keys": zeros(2, 3, 21, 8), "queries": zeros(2, 4, 4, 8)}, "query_heads", "BAD_SHAPE"),
    "queries of another size": ({"keys": zeros(2, 2, 21, 8), "queries": zeros(2, 4, 4, 7)}, "queries", "BAD_SHAPE"),
    "queries of another window": ({"keys": zeros(2, 2, 21, 8), "queries": zeros(2, 4, 5, 8)}, "queries", "BAD_SHAPE"),
    "no importance": ({"keys": zeros(2, 2, 21, 8)}, "queries", "BAD_SHAPE"),
    "two importances": (
        {"keys": zeros(2, 2, 21, 8), "queries": zeros(2, 4, 4, 8), "scores": zeros(2, 2, 21)},
        "scores",
        "BAD_SHAPE",
    ),
    "fewer layers of queries": ({"keys": zeros(2, 2, 21, 8), "queries": zeros(1, 4, 4, 8)}, "queries", "BAD_SHAPE"),
    "layers of two lengths": (
        {"keys": [zeros(2, 21, 8), zeros(2, 20, 8)], "queries": zeros(2, 4, 4, 8)},
        "keys",
        "BAD_SHAPE",
    ),
    "integer keys": ({"keys": zeros(2, 2, 21, 8, dtype=np.int32), "queries": zeros(2, 4, 4, 8)}, "keys", "BAD_SHAPE"),
    "no rope": ({"policy": PRE_ROPE, "keys": zeros(2, 2, 21, 8), "queries": zeros(2, 4, 4, 8)}, "rope", "ROPE_MISSING"),
    "similarity keys of post_rope": (
        {"keys": zeros(2, 2, 21, 8), "queries": zeros(2, 4, 4, 8), "similarity_keys": zeros(2, 2, 21, 8)},
        "similarity_keys",
        "BAD_SHAPE",
    ),
    "a rope too wide": (
        {"policy": PRE_ROPE, "rope": Rope((1.0,) * 8, 16), "keys": zeros(2, 2, 21, 8), "queries": zeros(2, 4, 4, 8)},
        "rope.rotary_dim",
        "BAD_SHAPE",
    ),
    "pinned outside": ({"keys": zeros(2, 2, 21, 8), "queries": zeros(2, 4, 4, 8), "pinned": [(3, 22)]}, "pinned", "BAD_SHAPE"),
    "an unknown layout": ({"layout": "NDH", "keys": zeros(2, 2, 21, 8), "queries": zeros(2, 4, 4, 8)}, "layout", "BAD_SHAPE"),
    "no policy": ({"policy": {"budget": 9}, "keys": zeros(2, 2, 21, 8), "queries": zeros(2, 4, 4, 8)}, "policy", "BAD_POLICY"),
    "a batch with one queries": (
        {"keys": [zeros(2, 2, 21, 8)] * 2, "queries": zeros(2, 4, 4, 8)},
        "queries",
        "BAD_SHAPE",
    ),
    "prompts of two models": (
        {"keys": [zeros(2, 2, 21, 8), zeros(2, 2, 21, 4)], "queries": [zeros(2, 4, 4, 8), zeros(2, 4, 4, 4)]},
        "keys",
        "BAD_SHAPE",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_names_its_argument(name: str) -> None:
    given, argument, reason = WRONG[name]
    with pytest.raises(InvalidInputError) as raised:
        call_of(**given)
    assert raised.value.argument == argument
    assert raised.value.reason == reason
    assert not raised.value.retryable
