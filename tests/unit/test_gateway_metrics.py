"""Metrics: isolated registries, bounded labels, gauges from heartbeats."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.metrics import GatewayMetrics
from shared.observability.metrics import MetricSet, label_word
from shared.protocol.messages import Usage, WorkerBeat


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", ""),
        ("digest", "digest"),
        ("aborted:peer 10.0.0.7 died", "aborted"),
        ("10.0.0.7", "other"),
        ("Ünïcode", "other"),
        ("x" * 100, "x" * 40),
    ],
)
def test_reasons_from_other_processes_become_one_word(text: str, word: str) -> None:
    assert label_word(text) == word


def test_two_sets_share_nothing() -> None:
    first, second = MetricSet(), MetricSet()
    first.counter("things_total", "Things.").inc()
    second.counter("things_total", "Things.")
    assert b"slipstream_things_total 1.0" in first.render()
    assert b"slipstream_things_total 0.0" in second.render()


@given(st.lists(st.floats(-1, 3, allow_nan=False) | st.sampled_from([0.1, 0.5, 2.0])))
def test_a_tally_says_what_a_histogram_says(values: list[float]) -> None:
    buckets = (0.1, 0.5, 2.0)
    ours, reference = MetricSet(), MetricSet()
    tally, histogram = ours.tally("s", "Seconds.", buckets), reference.histogram("s", "Seconds.", buckets)
    for value in values:
        tally.observe(value)
        histogram.observe(value)
    expected = [line for line in reference.render().splitlines() if b"_created" not in line]
    assert ours.render().splitlines() == expected


def test_counters_kept_elsewhere_are_read_at_the_scrape() -> None:
    counts = {"seen_total": 1}
    metrics = MetricSet()
    metrics.watch_counters({"seen_total": "Seen.", "unseen_total": "Unseen."}, lambda: counts)
    counts["seen_total"] = 5
    text = metrics.render().decode()
    assert "slipstream_seen_total 5.0" in text
    assert "slipstream_unseen_total 0.0" in text


def test_usage_is_counted_by_path_and_transport() -> None:
    metrics = GatewayMetrics("m")
    metrics.observe_usage(Usage(transport="tcp", kv_bytes=7, prefill_cached_tokens=3, handoff_ms=20))
    metrics.observe_usage(Usage("recompute", "peer_lost", decode_cached_tokens=2, preemptions=1))
    value = metrics.registry.get_sample_value
    assert value("slipstream_request_paths_total", {"path": "remote_prefill", "reason": ""}) == 1
    assert value("slipstream_request_paths_total", {"path": "recompute", "reason": "peer_lost"}) == 1
    assert value("slipstream_kv_transfer_bytes_total", {"transport": "tcp"}) == 7
    assert value("slipstream_kv_handoff_seconds_count") == 1
    assert value("slipstream_prefix_cached_tokens_total", {"role": "prefill"}) == 3
    assert value("slipstream_prefix_cached_tokens_total", {"role": "decode"}) == 2
    assert value("slipstream_preemptions_total") == 1


def test_nonsense_in_a_usage_does_not_break_a_counter() -> None:
    metrics = GatewayMetrics("m")
    metrics.observe_usage(Usage(kv_bytes=-5, prefill_cached_tokens=-1, handoff_ms=-3, preemptions=-2))
    assert metrics.registry.get_sample_value("slipstream_preemptions_total") == 0


def test_workers_come_and_go() -> None:
    beats = [
        WorkerBeat("p1", "prefill", "ready", "m", "n", "l", running=2, kv_tokens=100, kv_tokens_used=40),
        WorkerBeat("p2", "prefill", "loading", "m", "n", "l"),
        WorkerBeat("d1", "decode", "ready", "m", "n", "l", tokens_per_second=12.5, requests_swept=3),
    ]
    metrics = GatewayMetrics("m")
    metrics.watch_workers(lambda: beats)
    value = metrics.registry.get_sample_value
    assert value("slipstream_worker_running", {"worker": "p1", "role": "prefill"}) == 2
    assert value("slipstream_worker_kv_tokens_used", {"worker": "p1", "role": "prefill"}) == 40
    assert value("slipstream_worker_tokens_per_second", {"worker": "d1", "role": "decode"}) == 12.5
    assert value("slipstream_worker_requests_swept_total", {"worker": "d1", "role": "decode"}) == 3
    assert value("slipstream_worker_orphans_cancelled_total", {"worker": "d1", "role": "decode"}) == 0
    assert value("slipstream_workers", {"role": "prefill", "state": "loading"}) == 1
    del beats[0]
    assert value("slipstream_worker_running", {"worker": "p1", "role": "prefill"}) is None
