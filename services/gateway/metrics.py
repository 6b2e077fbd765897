"""What the gateway counts, and what the workers' heartbeats tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shared.bus.stream import StreamCounters
from shared.observability.metrics import PREFIX, MetricSet, label_word
from shared.protocol.messages import Usage, WorkerBeat

OUTCOME_REJECTED = "rejected"

_WORKER_LABELS = ("worker", "role")
_PLACE_LABELS = (*_WORKER_LABELS, "place")

_TTFT_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
_WAIT_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

_STREAM_TEXTS = {
    "journal_replays_total": "Journals read to fill a gap or after silence.",
    "resubmits_total": "Requests submitted again because Redis forgot them.",
    "repairs_total": "Requests whose journal had to be set back to what the client has.",
    "resubscribes_total": "Times the token channel was subscribed again.",
}


class GatewayMetrics(MetricSet):
    """Counters, gauges and histograms of one gateway.

    received = finished + error + cancelled + rejected + in flight, at any scrape: each generation
    request is received once and ends in one outcome.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self.received = self.counter("requests_received_total", "Generation requests that reached the gateway.")
        self.outcomes = self.counter("requests_total", "Generation requests ended, by outcome.", "route", "outcome")
        self.in_flight = self.gauge("requests_in_flight", "Generation requests being handled.")
        self.queued = self.gauge("requests_queued", "Requests waiting for a slot in this gateway.")
        self.admission_limit = self.gauge("admission_limit", "Prompts let in at once now.")
        self.admission_wait = self.histogram(
            "admission_wait_seconds", "From asking for a place to getting it.", _WAIT_BUCKETS
        )
        self.connections = self.gauge("connections_open", "Open client connections.")
        self.rejections = self.counter("rejections_total", "Requests refused, by error code.", "reason")
        self.idempotent_joins = self.counter(
            "idempotent_joins_total", "Generation requests that joined the one their Idempotency-Key stands for."
        )
        self.resumes = self.counter("stream_resumes_total", "Requests to read a stream on, by outcome.", "outcome")
        self.responses = self.counter("http_responses_total", "HTTP responses.", "route", "status")
        self.websockets = self.gauge("websockets_open", "Open WebSockets.")
        self.ttft = self.histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS)
        self.itl = self.tally("inter_token_latency_seconds", "Between tokens of one choice.", _ITL_BUCKETS)
        self.e2e = self.histogram("e2e_request_latency_seconds", "Arrival to end of the request.", _E2E_BUCKETS)
        self.handoff = self.histogram("kv_handoff_seconds", "Duration of the KV hand-off.", _TTFT_BUCKETS)
        self.prompt_tokens = self.counter("prompt_tokens_total", "Prompt tokens of accepted requests.")
        self.num_generated = 0
        self.watch_counters(
            {"generation_tokens_total": "Tokens delivered to clients."},
            lambda: {"generation_tokens_total": self.num_generated},
        )
        self.paths = self.counter("request_paths_total", "Ended jobs by the path they took.", "path", "reason")
        self.kv_bytes = self.counter("kv_transfer_bytes_total", "KV bytes moved between workers.", "transport")
        self.prefix_tokens = self.counter("prefix_cached_tokens_total", "Prompt tokens found in a cache.", "role")
        self.preemptions = self.counter("preemptions_total", "Preemptions of ended jobs.")
        self.unknown_fields = self.counter("unknown_fields_total", "Request fields ignored because unknown.")
        self.gauge("model_info", "The model this gateway serves.", "model").labels(model).set(1)

    def observe_usage(self, usage: Usage) -> None:
        """Count how one job was served; called once per job, with its terminal entry."""
        self.paths.labels(label_word(usage.path), label_word(usage.reason)).inc()
        if usage.kv_bytes > 0:
            self.kv_bytes.labels(label_word(usage.transport)).inc(usage.kv_bytes)
            self.handoff.observe(max(usage.handoff_ms, 0.0) / 1000)
        self.prefix_tokens.labels("prefill").inc(max(usage.prefill_cached_tokens, 0))
        self.prefix_tokens.labels("decode").inc(max(usage.decode_cached_tokens, 0))
        self.preemptions.inc(max(usage.preemptions, 0))

    def watch_streams(self, counters: StreamCounters) -> None:
        """Export what the gateway's end of the bus counts."""
        self.watch_counters(
            _STREAM_TEXTS,
            lambda: {
                "journal_replays_total": counters.replays,
                "resubmits_total": counters.resubmits,
                "repairs_total": counters.repairs,
                "resubscribes_total": counters.resubscribes,
            },
        )

    def watch_workers(self, beats: Callable[[], Sequence[WorkerBeat]]) -> None:
        """Export the latest heartbeats at each scrape."""
        self.registry.register(_WorkerCollector(beats))


class _WorkerCollector(Collector):
    """One family per heartbeat field, one sample per live worker."""

    _GAUGES = (
        ("running", "Requests running on the worker."),
        ("waiting", "Requests waiting on the worker."),
        ("kv_tokens", "KV room in tokens."),
        ("kv_tokens_used", "KV tokens in use."),
        ("tokens_per_second", "Tokens computed per second, lately."),
    )
    _COUNTERS = (
        ("dead_workers_swept", "Dead workers whose work this one brought back."),
        ("requests_swept", "Requests this worker brought back to the queue, or ended."),
        ("own_entries_swept", "Own work entries this worker had lost sight of and gave back."),
        ("orphans_cancelled", "Cancels this worker sent for requests whose gateway was gone."),
        ("generated_tokens", "Tokens sampled."),
        ("sequence_steps", "Steps counted once for each sequence that they gave tokens."),
    )
    _GUESSES = (
        ("drafted", "Guessed tokens that were computed, by their place in a draft."),
        ("accepted", "Guessed tokens that were what was sampled, by their place in a draft."),
    )

    def __init__(self, beats: Callable[[], Sequence[WorkerBeat]]) -> None:
        self._beats = beats

    def collect(self) -> Iterator[Metric]:
        beats = self._beats()
        for field, text in self._GAUGES:
            yield _filled(GaugeMetricFamily(f"{PREFIX}worker_{field}", text, labels=_WORKER_LABELS), field, beats)
        for field, text in self._COUNTERS:
            yield _filled(CounterMetricFamily(f"{PREFIX}worker_{field}", text, labels=_WORKER_LABELS), field, beats)
        for field, text in self._GUESSES:
            yield _by_place(
                CounterMetricFamily(f"{PREFIX}worker_{field}_tokens", text, labels=_PLACE_LABELS), field, beats
            )
        yield _states(beats)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, field: str, beats: Sequence[WorkerBeat]
) -> GaugeMetricFamily | CounterMetricFamily:
    for beat in beats:
        family.add_metric((beat.worker_id, beat.role), float(getattr(beat, field)))
    return family


def _by_place(family: CounterMetricFamily, field: str, beats: Sequence[WorkerBeat]) -> CounterMetricFamily:
    for beat in beats:
        for place, count in enumerate(getattr(beat, field), 1):
            family.add_metric((beat.worker_id, beat.role, str(place)), float(count))
    return family


def _states(beats: Sequence[WorkerBeat]) -> Metric:
    counts: dict[tuple[str, str], int] = {}
    for beat in beats:
        key = (beat.role, beat.state)
        counts[key] = counts.get(key, 0) + 1
    family = GaugeMetricFamily(f"{PREFIX}workers", "Live workers by role and state.", labels=("role", "state"))
    for key, count in sorted(counts.items()):
        family.add_metric(key, float(count))
    return family
