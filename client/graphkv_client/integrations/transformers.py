"""GraphKV inside Hugging Face transformers 5: `with compress(model, client, policy): model.generate(...)`.

Streams each layer's keys to the service while the prefill runs and drops, once it is done, what the service did not
choose. No model code: any decoder model whose attention goes through transformers' AttentionInterface. Knows the SDK's
stream, not what lies behind it.

This first form takes one unpadded prompt at a time, prefilled in one piece, with the same number of tokens in every layer and
KV head, and refuses the rest with InvalidInputError, except what it cannot see: `generate(prefill_chunk_size=...)` would be cut
after its first chunk.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import DynamicCache, PreTrainedModel

from graphkv.terms.catalogue import SCORERS
from graphkv.terms.errors import Reason, invalid
from graphkv.terms.needs import query_rows
from graphkv.terms.policy import Policy
from graphkv.terms.rope import Rope
from graphkv.terms.selection import LayerSelection, Selection, Summary
from graphkv_client.integrations._hf_cache import CompressedLayer, cache_argument, compressible, cut
from graphkv_client.integrations._hf_prefill import Observer, PrefilledLayer, observe_prefill

__all__ = [
    "CompressedLayer",
    "Compression",
    "Observer",
    "PrefillStream",
    "PrefilledLayer",
    "Streams",
    "cache_argument",
    "compress",
    "compressible",
    "cut",
    "observe_prefill",
]


class Streams(Protocol):
    """What is asked of a client: `graphkv_client.CompressClient` has it."""

    def stream(self, *, num_layers: int, policy: Policy, rope: Rope | None) -> Any:
        """A context manager with put(layer, keys=, queries=) that gives LayerSelections and then has a `summary`."""


class PrefillStream:
    """One prefill's way to the service and back, under one policy.

    Raises InvalidInputError at construction for a policy that cannot be applied to a transformers cache, and for a
    model whose rope it does not know where the policy needs it (`rope=` goes first).
    """

    def __init__(self, client: Streams, policy: Policy, model: PreTrainedModel, *, rope: Rope | None = None) -> None:
        if policy.scorer == "given":
            raise invalid("scorer", policy.scorer, "one that scores keys and queries: a prefill brings no scores of its own")
        if SCORERS[policy.scorer].needs:
            allowed = "one that scores keys and queries: a prefill does not tell what queries to expect"
            raise invalid("scorer", policy.scorer, allowed)
        if policy.budget_allocation != "uniform":
            raise invalid("budget_allocation", policy.budget_allocation, "uniform: one mask serves all layers")
        if policy.granularity == "model":
            allowed = "head or layer: one answer for all layers is not applied yet"
            raise invalid("granularity", policy.granularity, allowed)
        if policy.page_size is not None:
            raise invalid("page_size", policy.page_size, "None: a cache is cut token by token (page_align drops whole pages)")
        self.policy = policy
        self._client = client
        self._rope = rope
        self._config = model.config
        self._rope_for(1)  # what no length could make a rope of is said now
        self._open = contextlib.ExitStack()
        self._stream: Any = None
        self._layers: list[int] = []
        self._num_tokens = 0
        self._kv_heads = 0

    def wants(self, num_tokens: int) -> bool:
        """Whether there is anything to choose: n > B."""
        return num_tokens > self.policy.tokens(num_tokens)

    def begin(self, layers: list[int], num_tokens: int) -> None:
        """Opens the call for a prompt of n tokens whose layers have these numbers in the model."""
        self.close()
        self._layers, self._num_tokens = layers, num_tokens
        opened = self._client.stream(num_layers=len(layers), policy=self.policy, rope=self._rope_for(num_tokens))
        self._stream = self._open.enter_context(opened)

    def put(self, seen: PrefilledLayer) -> None:
        """Sends one layer on its way; returns before it is there."""
        self._kv_heads = seen.keys.shape[0]
        rows = query_rows(self.policy, self._num_tokens) or 1  # of any number, the last one is read
        queries = {"queries": seen.window(rows)} if SCORERS[self.policy.scorer].reads_attention else {}
        self._stream.put(self._layers.index(seen.layer), keys=seen.keys, **queries)

    def collect(self) -> tuple[Selection, dict[int, Any]]:
        """Waits for the rest; the selection, and the kept slots int32 [Hkv, B] by the model's own layer numbers."""
        try:
            answers = sorted(self._stream, key=lambda answer: answer.layer)
            selection = Selection(tuple(answers), self._stream.summary)
        finally:
            self.close()
        selection.check(num_tokens=self._num_tokens, policy=self.policy)
        return selection, {self._layers[answer.layer]: self._slots(answer) for answer in answers}

    def close(self) -> None:
        """Ends the call, cancelling it where it has not been answered; may find nothing to do."""
        self._stream = None
        self._open.close()

    def _rope_for(self, num_tokens: int) -> Rope | None:
        """The rope of a prompt of n tokens, on which some kinds depend; None where the policy needs none."""
        if self._rope is not None or not self.policy.needs_rope:
            return self._rope
        return Rope.from_config(self._config, num_tokens=num_tokens)

    def _slots(self, answer: LayerSelection) -> Any:
        """What each KV head of the layer keeps, also where they share an answer."""
        if isinstance(answer.indices, list):
            raise invalid("indices", "rows of different lengths", "rectangular", reason=Reason.BAD_SHAPE)
        return answer.indices if answer.granularity == "head" else answer.indices.expand(self._kv_heads, -1)


@dataclass(slots=True)
class Compression:
    """What `compress` did to the last prompt that was longer than its budget.

    selection: which tokens it kept; None before the first. exposed_seconds: how long the answer was waited for once the
    prefill was done.
    """

    selection: Selection | None = None
    exposed_seconds: float = 0.0

    @property
    def summary(self) -> Summary:
        """What the last call took."""
        return Summary() if self.selection is None else self.selection.summary


@dataclass(frozen=True, slots=True)
class _Compressor:
    """Sends what a prefill shows, and cuts its cache down by the answer."""

    stream: PrefillStream
    compression: Compression

    def wants(self, num_tokens: int) -> bool:
        return self.stream.wants(num_tokens)

    def begin(self, layers: list[int], num_tokens: int) -> None:
        self.stream.begin(layers, num_tokens)

    def layer(self, seen: PrefilledLayer) -> None:
        self.stream.put(seen)

    def end(self, cache: DynamicCache) -> None:
        started = time.perf_counter()
        self.compression.selection, kept = self.stream.collect()
        self.compression.exposed_seconds = time.perf_counter() - started
        for layer, slots in kept.items():
            held = cache.layers[layer]
            if isinstance(held, CompressedLayer):
                held.evict(slots)

    def abandon(self) -> None:
        self.stream.close()


@contextlib.contextmanager
def compress(model: PreTrainedModel, client: Streams, policy: Policy, *, rope: Rope | None = None) -> Iterator[Compression]:
    """Within the block, every prefill of `model` leaves a cache cut down to `policy.budget` tokens a KV head and layer.

    `model.generate()` and `model()` stay as they are: the first new token comes from the whole prompt, all later ones
    from what was kept, at their true positions. A prompt within the budget is not touched and nothing is sent. Layers
    with a sliding window are left alone. The cache may be kept and fed further, inside the block or after it.

    Args:
        model: a decoder model on any device, with an attention implementation that transformers registers (sdpa, ...).
        client: a CompressClient; its timeout covers the prefill, since the call is open while that runs.
        policy: which tokens to keep; uniform budgets of tokens, by KV head or by layer.
        rope: how the model rotates keys; read from its config where the policy needs it.

    Yields:
        A Compression, which says after each prefill what was kept.

    Raises:
        InvalidInputError: for what cannot be compressed, here or from the model's forward.
        GraphKVError: whatever the client raises, from the model's forward.
    """
    compression = Compression()
    with observe_prefill(model, _Compressor(PrefillStream(client, policy, model, rope=rope), compression)):
        yield compression
