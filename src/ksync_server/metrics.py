"""Counters for Prometheus, summed over every web process of the machine.

The folder named by PROMETHEUS_MULTIPROC_DIR has to be in the environment before this module is imported: the
client library decides at import. Without it (tests, command line) the counters stay in memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ksync_server.auth.rules import VERBS

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class StoreMetrics:
    """What the job worker knows of the bytes; the newest word of any process counts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._bytes = self._gauge(
            "ksync_blob_bytes", "Bytes of stored content, each once however often it is held."
        )
        self._blobs = self._gauge("ksync_blobs", "Stored contents.")
        self._damaged = self._gauge("ksync_blobs_damaged", "Contents whose bytes are wrong or missing.")
        self._garbage = self._gauge("ksync_extents_garbage", "Extents that wait to be erased.")
        self._erased = Counter(
            "ksync_extents_erased_total",
            "Extents erased because nothing names them: let go (garbage), or never published (orphan).",
            ("why",),
            registry=self._registry,
        )
        self._scrubbed = Counter(
            "ksync_scrubbed_bytes_total",
            "Bytes read and compared with their checksums.",
            registry=self._registry,
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry, multiprocess_mode="mostrecent")

    def stored(self, blobs: int, size: int, damaged: int, garbage: int) -> None:
        """What there is."""
        self._blobs.set(blobs)
        self._bytes.set(size)
        self._damaged.set(damaged)
        self._garbage.set(garbage)

    def erased(self, why: str, count: int) -> None:
        """The reaper took so many: `garbage` or `orphan`."""
        self._erased.labels(why).inc(count)

    def scrubbed(self, size: int) -> None:
        """So many bytes were read."""
        self._scrubbed.inc(size)

    def text(self) -> bytes:
        """This process' figures alone in Prometheus' text format."""
        return generate_latest(self._registry)


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
        self._disk_free = Gauge(
            "ksync_disk_free_bytes",
            "Free space of a disk that the store is on.",
            ("disk",),
            registry=self._registry,
            multiprocess_mode="livemin",
        )
        self._disk_full = Gauge(
            "ksync_disk_nearly_full",
            "1 while what grows is refused with 507.",
            registry=self._registry,
            multiprocess_mode="livemax",
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

    def disk(self, free: Mapping[str, int], full: str | None) -> None:
        """Room on the store's disks, bytes by name, and which one is nearly full; called once a second."""
        for name, size in free.items():
            self._disk_free.labels(name).set(size)
        self._disk_full.set(0 if full is None else 1)

    def text(self) -> bytes:
        """Everything in Prometheus' text format; reads the files of all processes."""
        registry = self._registry
        if os.environ.get(_FOLDER):
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
