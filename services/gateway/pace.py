"""How fast requests come to their end here, and how long one that waits will wait at that pace."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

WINDOW_S = 10.0
MIN_ENDED = 3
MAX_RETRY_AFTER_S = 30


class Pace:
    """Requests ended per second, lately: an exponential average over `WINDOW_S`, corrected for its start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._at = clock()
        self._level = 0.0
        self._ended = 0

    def count(self) -> None:
        """One request ended."""
        self._level = self._level_now() + 1
        self._at = self._clock()
        self._ended += 1

    @property
    def per_second(self) -> float:
        """0 while too little was seen to tell."""
        if self._ended < MIN_ENDED:
            return 0.0
        age = max(self._clock() - self._began, 1e-3)
        return self._level_now() / (WINDOW_S * -math.expm1(-age / WINDOW_S))

    def wait_s(self, ahead: float) -> float:
        """Seconds until a request goes that has `ahead` before it; 0 when nobody can tell."""
        rate = self.per_second
        return (ahead + 1) / rate if rate > 0 and ahead > 0 else 0.0

    def retry_after(self, queued: float) -> int:
        """Seconds for a Retry-After header: until about `queued` requests have ended, from 1 to 30."""
        rate = self.per_second
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(queued / rate))) if rate > 0 else 1

    def _level_now(self) -> float:
        return self._level * math.exp(-(self._clock() - self._at) / WINDOW_S)
