"""What LServe measures (DESIGN.md section 8), under names that do not change.

`Metrics()` keeps sums in memory, for tests and for code outside Ray. Inside a replica `Metrics(ServeInstrument)`
records through Ray Serve, so that everything reaches the Prometheus endpoint of the replica's node, where Ray puts
`ray_` before each name (the router's own /metrics takes it off again).
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)
"""Whole requests, prefills and waits: a million-token prompt takes minutes."""

TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Gaps between tokens."""

TRANSFER_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""One chunk's pages."""

FRACTION = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric. tags: the label names that every record must give. boundaries: of a histogram, ascending."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


class Instrument(Protocol):
    """Adds to a counter, sets a gauge, observes for a histogram."""

    def record(self, value: float, **tags: str) -> None:
        """Takes one value under these labels."""


class InMemoryInstrument:
    """Keeps count, sum and last value per label values."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.count: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self.sum: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self.last: dict[tuple[str, ...], float] = {}

    def record(self, value: float, **tags: str) -> None:
        """Takes one value under these labels."""
        key = tuple(tags[name] for name in self.spec.tags)
        self.count[key] += 1
        self.sum[key] += value
        self.last[key] = value


class ServeInstrument:
    """Records through Ray Serve; make it inside a replica, so that its labels name the replica."""

    def __init__(self, spec: Spec) -> None:
        from ray.serve import metrics

        tags: Any = spec.tags  # Ray's annotation allows for one tag only
        self._counts = spec.kind == "counter"
        self._take: Callable[[float, dict[str, str]], None]
        if spec.kind == "histogram":
            self._take = metrics.Histogram(spec.name, spec.description, list(spec.boundaries), tags).observe
        elif spec.kind == "gauge":
            self._take = metrics.Gauge(spec.name, spec.description, tags).set
        else:
            self._take = metrics.Counter(spec.name, spec.description, tags).inc

    def record(self, value: float, **tags: str) -> None:
        """Takes one value under these labels. Nothing to add to a counter is no error here, although it is for Ray."""
        if value or not self._counts:
            self._take(value, tags)


class Metrics:
    """Every metric as an attribute; `instrument` decides where values go."""

    def __init__(self, instrument: Callable[[Spec], Instrument] = InMemoryInstrument) -> None:
        def histogram(name: str, text: str, boundaries: tuple[float, ...], *tags: str) -> Instrument:
            return instrument(Spec(name, "histogram", text, tags, boundaries))

        def counter(name: str, text: str, *tags: str) -> Instrument:
            return instrument(Spec(name, "counter", text, tags))

        def gauge(name: str, text: str, *tags: str) -> Instrument:
            return instrument(Spec(name, "gauge", text, tags))

        self.time_to_first_token = histogram(
            "lserve_time_to_first_token_seconds", "From a request's arrival to its first token.", LATENCY_S
        )
        self.inter_token_latency = histogram(
            "lserve_inter_token_latency_seconds", "Gap between two tokens of a choice, as the router sees it.", TOKEN_S
        )
        self.time_per_output_token = histogram(
            "lserve_time_per_output_token_seconds", "A choice's mean gap after its first token.", TOKEN_S
        )
        self.e2e_request_latency = histogram(
            "lserve_e2e_request_latency_seconds", "From a request's arrival to its last token.", LATENCY_S
        )
        self.queue = histogram("lserve_queue_seconds", "How long a request waited for admission.", LATENCY_S)
        self.prefill = histogram(
            "lserve_prefill_seconds", "From the start of a prompt's prefill to its end.", LATENCY_S
        )
        self.kv_transfer = histogram("lserve_kv_transfer_seconds", "Pulling one chunk's pages.", TRANSFER_S)
        self.kv_transfer_bytes = counter("lserve_kv_transfer_bytes_total", "Bytes of pages and tail rows pulled.")
        self.kv_transfer_failures = counter(
            "lserve_kv_transfer_failures_total", "Prefills that were asked for again, by what went wrong.", "reason"
        )
        self.kv_pages = gauge("lserve_kv_pages", "Pages by pool and state.", "pool", "state")
        self.leases = gauge("lserve_leases", "Leases by state.", "state")
        self.prefix_tokens = counter("lserve_prefix_tokens_total", "Prompt tokens by where they came from.", "tier")
        self.prefix_pages = counter(
            "lserve_prefix_pages_total", "Pages asked of Redis or written to it, by what came of it.", "event"
        )
        self.redis_up = gauge("lserve_redis_up", "Whether the prefix pages' Redis answers: 1 or 0.")
        self.attention_density = histogram(
            "lserve_attention_density", "Fraction of dense attention's work that was done.", FRACTION, "phase"
        )
        self.tokens = counter("lserve_tokens_total", "Tokens of finished and running requests, by kind.", "kind")
        self.replays = counter("lserve_replays_total", "Requests asked again because their decode worker was lost.")
        self.preemptions = counter("lserve_preemptions_total", "Running sequences that made room for others.")
        self.requests = counter("lserve_requests_total", "Requests by outcome.", "outcome")
        self.running_requests = gauge("lserve_running_requests", "Requests at the workers.")
        self.waiting_requests = gauge("lserve_waiting_requests", "Requests that wait for admission.")
