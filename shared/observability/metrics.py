"""Prometheus building blocks; each service has one class of metrics over one `MetricSet`.

Rules for every metric: intervals come from one process's monotonic clock, and no label holds a
request id, a key or a user's text. Label values that come from other processes pass `label_word`.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

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

    def tally(self, name: str, text: str, buckets: Sequence[float]) -> Tally:
        """A histogram for what happens at every token; written by one thread only."""
        tally = Tally(PREFIX + name, text, buckets)
        self.registry.register(tally)
        return tally

    def watch_counters(self, help_texts: Mapping[str, str], read: Callable[[], Mapping[str, int]]) -> None:
        """Export integer counters that another object keeps; `help_texts` names them, `read` gives their values."""
        self.registry.register(_CounterCollector(help_texts, read))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class Tally(Collector):
    """A histogram without locks: what the library's costs for one observation, this costs for ten."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value in the lowest bucket whose bound it does not exceed."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class _CounterCollector(Collector):
    def __init__(self, help_texts: Mapping[str, str], read: Callable[[], Mapping[str, int]]) -> None:
        self._help_texts = help_texts
        self._read = read

    def collect(self) -> Iterator[Metric]:
        values = self._read()
        for name, text in self._help_texts.items():
            yield CounterMetricFamily(PREFIX + name, text, value=float(values.get(name, 0)))
