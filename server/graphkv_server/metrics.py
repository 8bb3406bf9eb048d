"""Every metric this service exports, in one table, and the HTTP listener that shows them (and, at /sd, where the replicas
show theirs, as Prometheus' http_sd reads it).

A name is `graphkv_` + thing + unit. No label holds a word a caller can invent: methods are ours, reasons come from
`graphkv.terms.errors`, and the tenant is "other" until callers have identities. One registry a replica, so that several
can live in one process.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

from graphkv.terms.errors import Reason
from graphkv_server.config import Address
from graphkv_server.directory import Seat

__all__ = ["ABANDONED", "OK", "TABLE", "Metrics", "MetricsListener"]

OK = "ok"
ABANDONED = "abandoned"
"""The outcome of a call whose caller left before its end: there was no one to answer."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_RATIO = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table: what prometheus_client is told."""

    kind: type[Counter] | type[Gauge] | type[Histogram]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: Sequence[float] = ()


TABLE = (
    Metric(Counter, "graphkv_requests_total", "Calls ended, by how: ok, the error's reason, or abandoned by their caller.",
           ("method", "reason", "tenant")),
    Metric(Histogram, "graphkv_request_duration_seconds", "From a call's arrival to its end.", ("method",), _SECONDS),
    Metric(Histogram, "graphkv_phase_duration_seconds", "Time of one layer, or of one step over all layers of a prompt, by "
           "phase: room (waiting for memory), receive, queue (waiting for the engine), compute.", ("phase",), _SECONDS),
    Metric(Counter, "graphkv_received_bytes_total", "Tensor bytes received.", ("encoding", "transport")),
    Metric(Gauge, "graphkv_in_flight_bytes", "Tensor bytes for which room is taken, of all calls."),
    Metric(Gauge, "graphkv_in_flight_requests", "Select calls open."),
    Metric(Gauge, "graphkv_waiting_requests", "Select calls waiting for room among the bytes in flight."),
    Metric(Gauge, "graphkv_queued_rows", "Rows (one KV head of one layer of one prompt) waiting for the engine."),
    Metric(Histogram, "graphkv_batch_rows", "Rows computed together.", (), _ROWS),
    Metric(Counter, "graphkv_rejections_total", "Calls refused by admission, before or while they were received.", ("reason",)),
    Metric(Counter, "graphkv_expired_before_start_total", "Layers whose deadline had passed before any work on them began."),
    Metric(Histogram, "graphkv_kept_score_ratio", "Per layer answered: the share of the base score's mass that is kept.",
           (), _RATIO),
    Metric(Counter, "graphkv_kept_tokens_total", "Tokens kept, summed over KV heads and layers; those that share an answer "
           "count each. Of pages, all their tokens."),
    Metric(Counter, "graphkv_changed_tokens_total", "Of the tokens kept, those that the base method would have dropped."),
    Metric(Gauge, "graphkv_draining_ratio", "1 while the replica drains, else 0."),
    Metric(Gauge, "graphkv_known_replicas", "Replicas that Locate names here."),
    Metric(Gauge, "graphkv_build_info", "Always 1; the labels say what runs.", ("version", "device")),
)  # fmt: skip


class Metrics:
    """The table's metrics as attributes (`metrics.in_flight_bytes` for graphkv_in_flight_bytes), in a registry of their own.

    Safe to use from any thread.
    """

    requests_total: Counter
    request_duration_seconds: Histogram
    phase_duration_seconds: Histogram
    received_bytes_total: Counter
    in_flight_bytes: Gauge
    in_flight_requests: Gauge
    waiting_requests: Gauge
    queued_rows: Gauge
    batch_rows: Histogram
    rejections_total: Counter
    expired_before_start_total: Counter
    kept_score_ratio: Histogram
    kept_tokens_total: Counter
    changed_tokens_total: Counter
    draining_ratio: Gauge
    known_replicas: Gauge
    build_info: Gauge

    def __init__(self, *, version: str = "", device: str = "") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nothing of ours reads
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        for line in TABLE:
            extra: dict[str, Any] = {"buckets": line.buckets} if line.buckets else {}
            made = line.kind(line.name, line.help, line.labels, registry=self.registry, **extra)
            setattr(self, line.name.removeprefix("graphkv_"), made)
        self.build_info.labels(version=version, device=device).set(1)

    def ended(self, method: str, outcome: str, seconds: float) -> None:
        """Counts one call: `outcome` is `OK`, `ABANDONED` or an error's reason."""
        known = outcome if outcome in (OK, ABANDONED) or outcome in Reason.__members__ else Reason.BUG.value
        self.requests_total.labels(method=method, reason=known, tenant="other").inc()
        self.request_duration_seconds.labels(method=method).observe(seconds)


class MetricsListener:
    """Serves a registry's metrics over HTTP in threads of its own, and at /sd where the `seats` have theirs.

    OSError where the address is taken.
    """

    def __init__(self, registry: CollectorRegistry, address: Address, seats: Callable[[], Iterable[Seat]]) -> None:
        self._server, self._thread = start_http_server(address.port, address.host, registry)
        self.address = Address(address.host, self._server.server_port)
        metrics = self._server.get_app()

        def answer(environ: Any, start_response: Any) -> Iterable[bytes]:
            if metrics is None or environ.get("PATH_INFO") == "/sd":
                start_response("200 OK", [("Content-Type", "application/json; charset=utf-8")])
                return [json.dumps(_targets(seats())).encode()]
            return metrics(environ, start_response)

        self._server.set_app(answer)

    def close(self) -> None:
        """Stops listening; an answer being written is finished."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _targets(seats: Iterable[Seat]) -> list[dict[str, Any]]:
    """A group for each replica that has metrics: its address, and its name as a label."""
    return [
        {"targets": [seat.metrics_address], "labels": {"replica": seat.replica}}
        for seat in sorted(seats, key=lambda seat: seat.replica)
        if seat.metrics_address
    ]
