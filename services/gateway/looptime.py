"""Time as the event loop has lived it: what others owe us cannot fall due while we stood still ourselves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TICK_S = 0.25
LONGEST_GAP_S = 2 * TICK_S
"""Of a longer time between two ticks only this much counts."""


class LoopTime:
    """Seconds in which the event loop turned. Run `run` beside whatever reads `now`; without it time stands still."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ticked_at = clock()
        self._counted_s = 0.0

    def now(self) -> float:
        return self._counted_s + min(self._clock() - self._ticked_at, LONGEST_GAP_S)

    def tick(self) -> None:
        self._counted_s = self.now()
        self._ticked_at = self._clock()

    async def run(self) -> None:
        """Tick for ever; ends by cancellation only."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()
