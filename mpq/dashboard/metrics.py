"""What monitoring reads, in the text form of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mpq.store.store import Store

_BUCKETS_S = (0.005, 0.02, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Metrics(Collector):
    """Requests as they are answered, and what the database says at the moment it is asked."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._requests = Counter(
            "mpq_requests", "Requests by route", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "mpq_request_seconds",
            "Time to the first byte of the answer",
            ["route"],
            buckets=_BUCKETS_S,
            registry=self._registry,
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one request; `route` is a template such as "GET /api/v1/runs/{run}"."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return all numbers."""
        return generate_latest(self._registry)

    def describe(self) -> Iterator[Metric]:
        """Name nothing before it is asked: registering needs no database."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Ask the database."""
        started = time.perf_counter()
        found = self._store.counts()
        seconds = time.perf_counter() - started
        by_state = GaugeMetricFamily("mpq_runs", "Runs by state", labels=["state"])
        for state, number in found.runs.items():
            by_state.add_metric([state.value], number)
        yield by_state
        for name, told, value in (
            ("mpq_runs_queued", "Runs that wait for any driver", found.queued),
            ("mpq_runs_driven", "Runs whose driver holds its lease", found.driven),
            ("mpq_oldest_queued_seconds", "Age of the oldest queued run", found.oldest_queued_s),
            ("mpq_partials", "Results of scoring tasks that are kept", found.partials),
            ("mpq_partials_seconds", "What computing them took", found.partial_seconds),
            ("mpq_database_seconds", "Time in which the database told these", seconds),
        ):
            yield GaugeMetricFamily(name, told, value)
