"""What an app tells Prometheus: requests, times of stages, and the numbers of what stands behind it.

Owns names and help texts; it must not know what the numbers mean. Each app has a registry of its own, so that
several can live in one process. ``expose`` is called on a worker thread: a snapshot may have to wait for a
lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from embedwire.serve.openai import Passage

STAGE_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
LABELS = {"ended": "cause", "waiting": "queue"}
"""What the keys of a snapshot's mapping are, by the field's name; ``state`` where nothing is said here."""
COUNTERS = frozenset(
    {
        "ended", "rounds_total", "bytes_total", "wire_bytes_total", "frames_refused_total", "turns_total",
        "encoded_total", "failed_total",
    }
)  # fmt: skip
"""Fields of a snapshot that only rise."""
NAMES = {"ended": "rooms_ended", "blocks_total": "blocks"}
"""Metrics with another name than the field: a gauge must not end in ``_total``."""

Stats = Callable[[], Any]
"""Takes a snapshot: a dataclass of numbers, and of mappings from names to numbers."""


class AppMetrics:
    """One app's metrics. ``stats`` maps a prefix to what takes a snapshot."""

    def __init__(self, stats: Mapping[str, Stats] | None = None) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "embedwire_requests", "Answered requests", ["route", "status"], registry=self.registry
        )
        self.under_way = Gauge("embedwire_requests_under_way", "Requests under way", registry=self.registry)
        self.retries = Counter(
            "embedwire_retries", "Attempts that another one followed", ["code"], registry=self.registry
        )
        self._stages = {
            name: Histogram(
                f"embedwire_{name}_seconds", text, registry=self.registry, buckets=STAGE_BUCKETS_S
            )
            for name, text in (
                ("encode", "From the announcement of a room to its embedding being ready"),
                ("transfer", "From a room's first grant to its last byte"),
                ("ttft", "From a request to its first token"),
            )
        }
        for prefix, take in (stats or {}).items():
            self.registry.register(SnapshotCollector(f"embedwire_{prefix}", take))

    def observe(self, passage: Passage) -> None:
        """Count the stages of an answer that has its first token."""
        for name, histogram in self._stages.items():
            ms = getattr(passage, f"{name}_ms")
            if ms is not None:
                histogram.observe(ms / 1000)

    def expose(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


class SnapshotCollector(Collector):
    """Turns each field of a snapshot into a metric, under the field's name."""

    def __init__(self, prefix: str, take: Stats) -> None:
        self._prefix = prefix
        self._take = take

    def collect(self) -> Iterator[Metric]:
        """Take a snapshot and yield its metrics."""
        snapshot = self._take()
        assert is_dataclass(snapshot)
        for field in fields(snapshot):
            value = getattr(snapshot, field.name)
            name = f"{self._prefix}_{NAMES.get(field.name, field.name)}"
            family = CounterMetricFamily if field.name in COUNTERS else GaugeMetricFamily
            is_mapping = isinstance(value, Mapping)
            labels = [LABELS.get(field.name, "state")] if is_mapping else []
            metric = family(name, field.name.replace("_", " "), labels=labels)
            for key, number in value.items() if is_mapping else [(None, value)]:
                metric.add_metric([] if key is None else [str(key)], number)
            yield metric

    def describe(self) -> Iterator[Metric]:
        """Nothing: what there is shows in the first snapshot, which must not be taken while the app is being
        built."""
        return iter(())
