"""Whether this process makes progress: the turns of its engine, and the ticks of its own event loop.

stalled      one turn of the engine takes far longer than any before: the heartbeat says so, nothing new is claimed
hung         it takes longer than `hang_timeout_s`: the process ends; a kernel that never returns cannot be joined
stood still  the event loop did not tick while our heartbeat expired (SIGSTOP, a machine asleep): peers may have taken
             the requests over. Scripts refuse what we no longer own; we only must not judge others by our own sleep
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import structlog

log = structlog.get_logger()

TICK_S = 0.25
MIN_STALL_S = 3.0
_STALL_FACTOR = 4


class Turns(Protocol):
    """What is watched; `shared.worker.bridge.EngineBridge` is one."""

    @property
    def turn_began(self) -> float | None: ...


class Watchdog:
    """Run `run` beside the worker's loops. `on_hang` is not expected to return."""

    def __init__(
        self,
        turns: Turns,
        hang_timeout_s: float,
        longest_gap_s: float,
        on_hang: Callable[[str], object],
        on_gap: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._turns = turns
        self._hang_timeout_s = hang_timeout_s
        self._longest_gap_s = longest_gap_s
        self._on_hang = on_hang
        self._on_gap = on_gap
        self._clock = clock
        self._ticked = self._awake_since = clock()
        self._began: float | None = None
        self._turn_s = 0.0
        self._longest_turn_s = 0.0

    @property
    def is_stalled(self) -> bool:
        """The engine is inside one turn for far longer than it should."""
        patience = max(MIN_STALL_S, _STALL_FACTOR * self._longest_turn_s)
        return self._turn_s > min(patience, self._hang_timeout_s)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        now = self._clock()
        gap, self._ticked = now - self._ticked, now
        if gap > self._longest_gap_s:
            self._awake_since = now
            log.warning("worker_stood_still", seconds=round(gap, 1))
            self._on_gap()
        was_stalled = self.is_stalled
        self._observe(now)
        if self.is_stalled != was_stalled:
            log.warning("engine_stalled" if not was_stalled else "engine_recovered", turn_s=round(self._turn_s, 1))
        if self._turn_s > self._hang_timeout_s:
            self._on_hang(f"the engine made no turn for {self._turn_s:.0f} s")

    def _observe(self, now: float) -> None:
        """Time in which the whole process stood still is not the engine's fault."""
        began = self._turns.turn_began
        if began != self._began:
            self._longest_turn_s = max(self._longest_turn_s, self._turn_s)
            self._began, self._turn_s = began, 0.0
        if began is not None:
            self._turn_s = now - max(began, self._awake_since)
