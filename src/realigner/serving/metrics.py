"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of their own.

    Attributes:
        requests: by route and HTTP status; 499 is one whose client left.
        seconds: that requests took, by route.
        first_token: seconds from a request's entry into the batch to its first token.
        tokens: read (``prompt``) and written (``reply``).
        acted: requests in which an IRM acted, by IRM.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "realigner_requests", "Requests by route and HTTP status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "realigner_request_seconds", "Seconds of a request.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.first_token = Histogram(
            "realigner_first_token_seconds", "Seconds to the first token.", buckets=_SECONDS, registry=self.registry
        )
        self.tokens = Counter("realigner_tokens", "Tokens read and written.", ["kind"], registry=self.registry)
        self.acted = Counter("realigner_irm_requests", "Requests in which an IRM acted.", ["irm"], registry=self.registry)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A gauge that is asked for its value when it is read."""
        Gauge(f"realigner_{name}", about, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
