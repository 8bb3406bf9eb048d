"""CompressClient: the synchronous client. `stream` beside it has its streams, `aio` the same for asyncio.

A thin shell around `_call`, which says what is sent and what an answer means. May be used from several threads at once;
does not survive a fork: make it in the process that uses it.
"""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from graphkv_proto import messages

from graphkv.terms.capabilities import Capabilities
from graphkv.terms.errors import GraphKVError
from graphkv.terms.policy import Policy
from graphkv.terms.rope import Rope
from graphkv.terms.selection import Selection
from graphkv_client._arrays import Array
from graphkv_client._attempts import Attempt
from graphkv_client._call import Selecting, check_encoding, selecting
from graphkv_client._channel import closed_error, error_of, is_cancellation
from graphkv_client._exchange import Exchange
from graphkv_client._fallback import check_possible, covers
from graphkv_client._feed import Feed
from graphkv_client._fleet import Fleet
from graphkv_client._inputs import CallTerms
from graphkv_client._retry import Tries
from graphkv_client.options import (
    DEFAULT_ATTEMPT_TIMEOUT,
    DEFAULT_ATTEMPTS,
    DEFAULT_BUFFERED_BYTES,
    DEFAULT_TIMEOUT,
    ClientOptions,
    Observer,
    check_timeout,
)
from graphkv_client.stream import LayerStream

__all__ = ["CompressClient"]


class CompressClient:
    """A client of one GraphKV service. Close it, or use it as a context manager.

    Args:
        address: "host:port", or any gRPC target.
        timeout: seconds that a call may take; each method takes its own instead.
        max_buffered_bytes: what one stream may hold in copies of its own (`put(copy=True)`).
        locate: whether to ask the service for its replicas and call them directly; else every call goes to the address.
        attempt_timeout: seconds of silence after which a call leaves a replica for another.
        max_attempts: how often one call may be sent; 1 turns retries off.
        on_unavailable: what a call does that the service did not answer: "raise", "local" (choose in this process, which
            needs torch) or "keep_all" (keep every token). `Summary.where` says which it was.
        metrics: counts attempts and fall-backs; see `graphkv_client.metrics`.

    Raises:
        InvalidInputError: an option is out of range.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        max_buffered_bytes: int = DEFAULT_BUFFERED_BYTES,
        locate: bool = True,
        attempt_timeout: float = DEFAULT_ATTEMPT_TIMEOUT,
        max_attempts: int = DEFAULT_ATTEMPTS,
        on_unavailable: str = "raise",
        metrics: Observer | None = None,
    ) -> None:
        self._options = ClientOptions(
            address=address,
            timeout=timeout,
            max_buffered_bytes=max_buffered_bytes,
            locate=locate,
            attempt_timeout=attempt_timeout,
            max_attempts=max_attempts,
            on_unavailable=on_unavailable,
            metrics=metrics,
        )
        check_possible(on_unavailable)
        self._fleet = Fleet(self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and the calls that still run. A second time does nothing; any other use raises."""
        self._fleet.close()

    def select(
        self,
        keys: Array | Sequence[Any],
        *,
        policy: Policy,
        queries: Any = None,
        attention: Any = None,
        scores: Any = None,
        values: Any = None,
        query_mean: Any = None,
        query_covariance: Any = None,
        similarity_keys: Any = None,
        positions: Any = None,
        pinned: Any = None,
        rope: Rope | None = None,
        layout: str = "HND",
        outputs: Sequence[str] = (),
        encoding: str = "auto",
        timeout: float | None = None,
    ) -> Selection | list[Selection]:
        """The tokens to keep, as `graphkv.select` would choose them.

        Args:
            keys: post-RoPE keys of one prompt, [L, Hkv, n, d] or a sequence of L arrays [Hkv, n, d]; or a list of such
                prompts, in which case every other array and `pinned` is a list too and so is the answer. numpy, torch
                (any device and strides) or DLPack; float64, float32, float16, bfloat16 or float8.
            policy: which tokens to keep and how.
            queries: the last w tokens' queries, [L, Hq, w, d]; w is the policy's observation window.
            attention: instead, their attention to all tokens, [L, Hq, w, n]. With numpy, queries are far smaller.
            scores: instead, the caller's own scores, [L, Hkv, n]; -inf marks padding.
            values: the tokens' values, [L, Hkv, n, any]; their norms travel (expected_attention).
            query_mean: the mean of queries to come, [L, Hq, d] (expected_attention; see `graphkv.rope.average_rope`).
            query_covariance: their covariance, [L, Hq, d, d], likewise.
            similarity_keys: what the graph compares instead of the keys, [L, Hkv, n, x] (similarity "pre_rope").
            positions: where the keys' tokens stood, [L, n] or [L, Hkv, n], default 0..n-1 (similarity "pre_rope").
            pinned: ranges (start, stop) of tokens that are always kept.
            rope: how the keys were rotated; needed by similarity "pre_rope".
            layout: "HND", or "NHD" where keys and similarity_keys are [L, n, Hkv, d] and queries [L, w, Hq, d].
            outputs: what each layer's answer shall hold besides the tokens, names of `graphkv.terms.catalogue.OUTPUTS`; they
                are in `LayerSelection.outputs`. Where heads share an answer, arrays have no axis of KV heads and the rows of
                "dropped_ranges" and "moves" name head 0; decay_factors and choice_order are each head's own.
            encoding: how numbers are written: "exact", or "auto", which is exact.
            timeout: seconds, the client's where left out.

        Returns:
            A Selection; its arrays are of the caller's kind and on its device, its indices int32 and ascending: [Hkv, B] in
            each layer, or a list of Hkv arrays where heads keep different numbers (budget_allocation "adaptive_heads",
            scores of -inf); [B] with granularity "layer"; [B] and one answer for all layers with "model". They are ids of
            pages where the policy has a page_size. Torch tensors are scored where they are and what travels are the
            candidates, and all scores where the answer depends on them; of numpy arrays, and with budget_allocation "cake"
            of any, everything travels. The answer is the same.

        Raises:
            InvalidInputError: the arguments are wrong, or the policy cannot give an output; it names the argument.
            OverloadedError, UnavailableError, DeadlineError, AccessError, InternalError: see `graphkv.terms.errors`.
        """
        started = time.monotonic()
        given = {
            "keys": keys,
            "queries": queries,
            "attention": attention,
            "scores": scores,
            "values": values,
            "query_mean": query_mean,
            "query_covariance": query_covariance,
            "similarity_keys": similarity_keys,
            "positions": positions,
        }
        limit = self._limit(timeout)
        plan = selecting(given, terms=CallTerms(policy, rope, layout, outputs), pinned=pinned, encoding=encoding)
        call = self._fleet.call(limit)
        while True:
            attempt: Attempt | None = None
            try:
                with self._fleet.attempt(call) as attempt:
                    self._exchanged(plan, attempt, call)
                return plan.result(seconds=time.monotonic() - started, attempts=call.attempts)
            except GraphKVError as error:
                if self._fleet.again(call, error, attempt):
                    plan = plan.again()
                    continue
                own_fault = attempt is not None and attempt.own_fault
                if own_fault or not self._options.falls_back or not covers(error):
                    raise
            self._fleet.fell_back()
            choice = self._options.on_unavailable
            return plan.instead(choice, seconds=time.monotonic() - started, attempts=call.attempts)

    def _exchanged(self, plan: Selecting, attempt: Attempt, call: Tries) -> None:
        """All messages to one replica, all answers back. Raises GraphKVError."""
        exchange = Exchange(plan.call, attempt, lambda: self._fleet.closed)
        try:
            for response in exchange.start(attempt.line.select, plan.requests(), call.remaining):
                plan.call.fold(response)
            plan.call.close()
        except (grpc.RpcError, GraphKVError) as error:
            found = exchange.failed(error)
            if found is error:
                raise
            raise found from error
        finally:
            exchange.end()

    def stream(
        self,
        *,
        num_layers: int,
        policy: Policy,
        num_tokens: int | Sequence[int] | None = None,
        pinned: Any = None,
        rope: Rope | None = None,
        layout: str = "HND",
        outputs: Sequence[str] = (),
        encoding: str = "auto",
        timeout: float | None = None,
    ) -> LayerStream:
        """A stream of layers, for a prefill that is still running. See LayerStream.

        With granularity "model" or budget_allocation "cake" (`policy.needs_all_layers`) no layer of a prompt is answered
        before all of them were put; "model" then gives one answer a prompt, of layer 0.

        Args:
            num_layers: L.
            policy: which tokens to keep and how.
            num_tokens: n, where layers come in chunks of tokens; or a list, one n a prompt, for a batch of prompts. Left
                out, every put is a whole layer of one prompt.
            pinned: ranges of tokens that are always kept; a list of such lists for a batch.
            rope: as in `select`.
            layout: as in `select`.
            outputs: as in `select`.
            encoding: as in `select`.
            timeout: seconds from entering the block to the last answer, so it covers the prefill.

        Raises:
            InvalidInputError: an argument is wrong, or the policy cannot give an output.
        """
        limit = self._limit(timeout)
        check_encoding(encoding)
        feed = Feed(CallTerms(policy, rope, layout, outputs), layers=num_layers, tokens=num_tokens, pinned=pinned)
        return LayerStream(self._fleet, feed, encoding, limit, self._options)

    def capabilities(self, *, timeout: float | None = None) -> Capabilities:
        """What the replica that answers can do and how much it takes. Raises GraphKVError where none answers."""
        return self._capabilities(self._fleet.call(self._limit(timeout)))

    def _capabilities(self, call: Tries) -> Capabilities:
        while True:
            attempt: Attempt | None = None
            try:
                with self._fleet.attempt(call) as attempt:
                    return messages.read_capabilities(self._asked(attempt, call))
            except GraphKVError as error:
                if not self._fleet.again(call, error, attempt):
                    raise

    def _asked(self, attempt: Attempt, call: Tries) -> Any:
        """One replica's answer for its capabilities. Raises GraphKVError."""
        try:
            return attempt.line.capabilities(messages.write_capabilities_request(), timeout=self._fleet.patience(attempt))
        except ValueError as error:  # gRPC's word for a closed channel
            raise closed_error("client") from error
        except grpc.RpcError as error:
            attempt.own_fault = self._fleet.closed and is_cancellation(error)
            raise (closed_error("client") if attempt.own_fault else self._fleet.unanswered(attempt, error_of(error))) from error

    def ping(self, *, timeout: float | None = None) -> float:
        """Seconds from here to the service and back. Raises UnavailableError where none answers."""
        call = self._fleet.call(self._limit(timeout))
        started = time.monotonic()
        self._capabilities(call)
        return time.monotonic() - started

    def _limit(self, timeout: float | None) -> float:
        if self._fleet.closed:
            raise closed_error("client")
        return self._options.timeout if timeout is None else check_timeout(timeout)
