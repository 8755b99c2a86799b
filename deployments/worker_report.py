"""What a worker reports once a second: gauges, and the counters that its engine and its prefix store keep."""

from dataclasses import asdict

from lserve.engine.leases import LeaseCounts
from lserve.engine.prefix_store import PrefixStore
from lserve.engine.results import EngineLoad

from .metrics import Metrics

_PAGE_EVENTS = ("hits", "misses", "rejected", "unavailable", "stored", "present", "dropped")


class WorkerReport:
    """Remembers what it reported of counters that only grow, and passes on what came since."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._reported: dict[str, int] = {}

    def record(self, load: EngineLoad, leases: LeaseCounts, store: PrefixStore | None) -> None:
        """Takes the present state of everything."""
        metrics = self._metrics
        for pool, used, cached, total in (
            ("retrieval", load.used_pages, load.cached_pages, load.total_pages),
            ("streaming", load.used_streaming_pages, load.cached_streaming_pages, load.total_streaming_pages),
            ("tail", load.used_rows, 0, load.total_rows),
        ):
            for state, value in (("held", used), ("cached", cached), ("free", total - used - cached)):
                metrics.kv_pages.record(value, pool=pool, state=state)
        for state, value in (("held", leases.held), ("released", leases.released), ("expired", leases.expired)):
            metrics.leases.record(value, state=state)
        metrics.running_requests.record(load.running)
        metrics.waiting_requests.record(load.waiting)
        if growth := self._growth("preemptions", load.preemptions):
            metrics.preemptions.record(growth)
        if store is not None:
            metrics.redis_up.record(store.is_available)
            counts = asdict(store.counters)
            for event in _PAGE_EVENTS:
                if growth := self._growth(event, counts[event]):
                    metrics.prefix_pages.record(growth, event=event)

    def _growth(self, name: str, total: int) -> int:
        before = self._reported.get(name, 0)
        self._reported[name] = total
        return total - before
