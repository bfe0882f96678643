"""The figures of `/metrics` for Prometheus: requests, latency, tokens, answers under way, the request log."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Meters:
    """The gateway's metrics, in their own registry: two gateways in one process count separately."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        which = ("arm", "version")
        self._requests = Counter(
            "ratchet_requests",
            "Chat requests that ended, by HTTP status (499: the client hung up)",
            ("status", *which),
            registry=self._registry,
        )
        self._latency = Histogram(
            "ratchet_latency_seconds",
            "Time of a whole answer",
            which,
            buckets=SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            "ratchet_first_token_seconds",
            "Time until the first text of an answer",
            which,
            buckets=SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter(
            "ratchet_tokens",
            "Tokens, read (prompt) and written (answer)",
            ("kind", *which),
            registry=self._registry,
        )

    def show(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """Add a figure that `read` returns whenever the metrics are read."""
        Gauge(name, meaning, registry=self._registry).set_function(read)

    def refused(self, status: int) -> None:
        """Count a request that reached no version."""
        self._requests.labels(str(status), "", "").inc()

    def ended(
        self,
        status: int,
        arm: str,
        version: int,
        *,
        seconds: float,
        first: float,
        prompt_tokens: int,
        answer_tokens: int,
    ) -> None:
        """Count a request that ended; `seconds` and `first` are in seconds, and `first` is 0 without text."""
        which = (arm, str(version))
        self._requests.labels(str(status), *which).inc()
        self._latency.labels(*which).observe(seconds)
        if first:
            self._first.labels(*which).observe(first)
        self._tokens.labels("prompt", *which).inc(prompt_tokens)
        self._tokens.labels("answer", *which).inc(answer_tokens)

    def text(self) -> bytes:
        return generate_latest(self._registry)
