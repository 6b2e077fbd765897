"""How fast prefill is, from what it has seen."""

from __future__ import annotations

import pytest

from services.prefill import pace as pace_module
from services.prefill.pace import Pace


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", clock)
    return clock


def spend(pace: Pace, clock: Clock, num_tokens: int, seconds: float) -> None:
    with pace.measure() as measured:
        clock.now += seconds
    measured(num_tokens)


def test_before_anything_was_seen_it_guesses() -> None:
    pace = Pace()
    assert pace.seconds(0) == 0
    assert pace.seconds(500) == pytest.approx(1.0)
    assert pace.transfer_seconds(94_000_000) == pytest.approx(0.094)


def test_it_comes_to_what_it_measures(clock: Clock) -> None:
    pace = Pace()
    for _ in range(60):
        spend(pace, clock, 512, 0.25)
    assert pace.seconds(2048) == pytest.approx(1.0, rel=1e-3)


def test_one_odd_chunk_moves_it_a_fifth_of_the_way(clock: Clock) -> None:
    pace = Pace()
    spend(pace, clock, 1500, 1.0)
    assert pace.seconds(700) == pytest.approx(1.0)


@pytest.mark.parametrize(("num_tokens", "seconds"), [(0, 1.0), (-3, 1.0), (100, 0.0)])
def test_a_measurement_without_tokens_or_time_counts_nothing(clock: Clock, num_tokens: int, seconds: float) -> None:
    pace = Pace()
    spend(pace, clock, num_tokens, seconds)
    assert pace.seconds(500) == pytest.approx(1.0)


def test_time_after_the_wait_is_counted_until_the_tokens_are_known(clock: Clock) -> None:
    pace = Pace()
    with pace.measure() as measured:
        clock.now += 0.5
        measured(500)
        clock.now += 99
    assert pace.seconds(600) == pytest.approx(1.0)
