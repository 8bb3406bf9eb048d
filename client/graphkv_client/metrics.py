"""ClientMetrics: attempts and fall-backs of clients, counted for Prometheus; opt-in, in a registry of the caller's.

The only room that knows prometheus_client, which the light client does not install.
"""

from typing import Any

from graphkv.terms.errors import InvalidInputError, Reason

__all__ = ["ClientMetrics"]

_OUTCOMES = frozenset({"ok", *Reason})


class ClientMetrics:
    """Pass it to the clients whose calls it shall count: `CompressClient(address, metrics=ClientMetrics(registry))`.

    `registry`: a prometheus_client registry; one ClientMetrics each. Raises InvalidInputError where prometheus_client is
    not installed.
    """

    def __init__(self, registry: Any) -> None:
        try:
            from prometheus_client import Counter
        except ImportError as error:
            message = "metrics need prometheus_client, which is not installed: pip install prometheus-client"
            raise InvalidInputError(message, argument="metrics") from error
        self._attempts = Counter(
            "graphkv_client_attempts_total",
            "Attempts of calls, by how they ended: ok, or the reason they failed for.",
            ("outcome",),
            registry=registry,
        )
        self._fallbacks = Counter(
            "graphkv_client_fallbacks_total",
            "Calls that were answered without the service, by what was chosen instead.",
            ("choice",),
            registry=registry,
        )

    def attempted(self, outcome: str) -> None:
        """One attempt of a call ended; a reason that this version does not know counts as other."""
        self._attempts.labels(outcome=outcome if outcome in _OUTCOMES else "other").inc()

    def fell_back(self, choice: str) -> None:
        """A call was answered without the service."""
        self._fallbacks.labels(choice=choice).inc()
