"""What the metrics page learns of one answer while it is generated."""

from __future__ import annotations

import time

from services.gateway.metrics import GatewayMetrics
from shared.protocol.messages import End, Job


class TokenMeter:
    """Counts one answer's tokens and times, for the client that asked for it first.

    Whoever joins or resumes an answer has no meter, so each token is counted once. `arrived`: when the request did,
    by the monotonic clock.
    """

    def __init__(self, metrics: GatewayMetrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._is_first = True
        self._last_at: dict[int, float] = {}

    def submitted(self, job: Job) -> None:
        self._metrics.prompt_tokens.inc(len(job.prompt_ids))

    def tokens(self, choice: int, count: int) -> None:
        """`count` new tokens of a choice came."""
        now = time.monotonic()
        if self._is_first:
            self._is_first = False
            self._metrics.ttft.observe(now - self._arrived)
        if choice in self._last_at:
            self._metrics.itl.observe((now - self._last_at[choice]) / count)
        self._last_at[choice] = now
        self._metrics.num_generated += count

    def ended(self, end: End) -> None:
        self._metrics.observe_usage(end.usage)
