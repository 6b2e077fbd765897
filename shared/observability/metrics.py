"""Prometheus building blocks; each service has one class of metrics over one `MetricSet`.

Rules for every metric: intervals come from one process's monotonic clock, and no label holds a
request id, a key or a user's text. Label values that come from other processes pass `label_word`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "slipstream_"

_WORD = re.compile(r"[a-z][a-z0-9_]{0,39}")


def label_word(text: str) -> str:
    """The first word of a reason from another process (`aborted:peer died` → `aborted`), or `other`."""
    match = _WORD.match(text)
    if not text:
        return ""
    return match.group() if match else "other"


class MetricSet:
    """A registry of its own, so that two services in one process (tests) never share a counter."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

    def watch_counters(self, help_texts: Mapping[str, str], read: Callable[[], Mapping[str, int]]) -> None:
        """Export integer counters that another object keeps; `help_texts` names them, `read` gives their values."""
        self.registry.register(_CounterCollector(help_texts, read))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _CounterCollector(Collector):
    def __init__(self, help_texts: Mapping[str, str], read: Callable[[], Mapping[str, int]]) -> None:
        self._help_texts = help_texts
        self._read = read

    def collect(self) -> Iterator[Metric]:
        values = self._read()
        for name, text in self._help_texts.items():
            yield CounterMetricFamily(PREFIX + name, text, value=float(values.get(name, 0)))
