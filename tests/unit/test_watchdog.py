"""When an engine counts as stalled or hung, and what a standstill of the whole process changes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from shared.worker import watchdog as module
from shared.worker.watchdog import MIN_STALL_S, TICK_S, Watchdog

HANG_S = 60.0
GAP_S = 3.0


@dataclass
class Rig:
    """A watchdog with a clock and an engine that the test moves."""

    now: float = 100.0
    turn_began: float | None = None
    hung: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watchdog = Watchdog(
            self, HANG_S, GAP_S, self.hung.append, lambda: self.gaps.append(self.now), clock=lambda: self.now
        )

    def passes(self, seconds: float, step: float = TICK_S) -> None:
        for _ in range(round(seconds / step)):
            self.now += step
            self.watchdog.tick()

    def turn(self, seconds: float) -> None:
        """One whole turn of the engine."""
        self.turn_began = self.now
        self.passes(seconds)
        self.turn_began = None
        self.passes(TICK_S)


def stalled(rig: Rig) -> bool:
    return rig.watchdog.is_stalled


def test_an_idle_engine_is_well() -> None:
    rig = Rig()
    rig.passes(1000)
    assert not stalled(rig)
    assert not rig.hung
    assert not rig.gaps


def test_many_short_turns_are_well() -> None:
    rig = Rig()
    for _ in range(100):
        rig.turn(1.0)
    assert not stalled(rig)


def test_a_turn_without_end_is_a_stall_and_then_a_hang() -> None:
    rig = Rig()
    rig.turn_began = rig.now
    rig.passes(MIN_STALL_S)
    assert not stalled(rig)
    rig.passes(TICK_S)
    assert stalled(rig)
    assert rig.hung == []
    rig.passes(HANG_S - MIN_STALL_S)
    assert len(rig.hung) >= 1
    assert "60 s" in rig.hung[0]


def test_it_recovers_when_the_turn_ends() -> None:
    rig = Rig()
    rig.turn(10)
    assert not stalled(rig)
    assert rig.hung == []


def test_an_engine_that_is_slow_by_nature_gets_more_patience_but_not_without_bound() -> None:
    rig = Rig()
    rig.turn(5)
    rig.turn_began = rig.now
    rig.passes(19)
    assert not stalled(rig)
    rig.passes(2)
    assert stalled(rig)
    rig.passes(20)
    rig.turn_began = None
    rig.passes(1)
    rig.turn_began = rig.now
    rig.passes(HANG_S + 2 * TICK_S)
    assert stalled(rig), "never more patient than until it counts as hung"
    assert rig.hung


def test_a_standstill_of_the_process_is_told_and_not_blamed_on_the_engine() -> None:
    rig = Rig()
    rig.turn_began = rig.now
    rig.passes(1)
    rig.now += 1000
    rig.watchdog.tick()
    assert len(rig.gaps) == 1
    assert not stalled(rig)
    assert rig.hung == []
    rig.passes(MIN_STALL_S + TICK_S)
    assert stalled(rig), "it hangs all the same"
    assert len(rig.gaps) == 1


def test_a_late_tick_is_no_standstill() -> None:
    rig = Rig()
    rig.passes(30, step=GAP_S)
    assert rig.gaps == []


async def test_it_ticks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.001)
    rig = Rig()
    rig.turn_began = rig.now
    rig.watchdog.tick()
    rig.now += GAP_S
    running = asyncio.create_task(rig.watchdog.run())
    async with asyncio.timeout(10):
        while not rig.watchdog._turn_s:
            await asyncio.sleep(0.001)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert rig.watchdog._turn_s == GAP_S
