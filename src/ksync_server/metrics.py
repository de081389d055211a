"""Counters for Prometheus, summed over every web process of the machine.

The folder named by PROMETHEUS_MULTIPROC_DIR has to be in the environment before this module is imported: the
client library decides at import. Without it (tests, command line) the counters stay in memory.
"""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ksync_server.auth.gate import VERBS

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The figures of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "ksync_requests_total",
            "Answered requests.",
            ("site", "method", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "ksync_request_seconds",
            "Time from the end of the head to the end of the answer.",
            ("site",),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._running = Gauge(
            "ksync_requests_running",
            "Requests being answered.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._connections = Gauge(
            "ksync_connections",
            "Open connections.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        # `labels` takes a lock and builds keys: the few combinations that occur are kept.
        self._children: dict[tuple[str, str, int], Counter] = {}
        self._timers: dict[str, Histogram] = {}

    def answered(self, site: str, method: str, status: int, seconds: float) -> None:
        """Count one request (5 us)."""
        key = (site, method if method in VERBS else "other", status // 100)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self._requests.labels(site, key[1], f"{key[2]}xx")
        child.inc()
        timer = self._timers.get(site)
        if timer is None:
            timer = self._timers[site] = self._seconds.labels(site)
        timer.observe(seconds)

    def load(self, running: int, connections: int) -> None:
        """What this process is doing now; called once a second."""
        self._running.set(running)
        self._connections.set(connections)

    def text(self) -> bytes:
        """Everything in Prometheus' text format; reads the files of all processes."""
        registry = self._registry
        if os.environ.get(_FOLDER):
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
