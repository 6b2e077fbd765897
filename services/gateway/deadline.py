"""How long a request may take: the client's own `timeout` from its arrival, the gateway's limit from submission."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from services.gateway.errors import DeadlineExceeded
from shared.protocol.messages import Job

_NO_TIME = "The request's timeout was over before it could be submitted; allow more time."


@dataclass(frozen=True, slots=True)
class Deadline:
    """`arrived` by the monotonic clock; `timeout_s` None when the client set none."""

    arrived: float
    timeout_s: float | None = None

    def left_s(self) -> float | None:
        """Seconds of the client's timeout that are left, None when it set none. Raises DeadlineExceeded at zero."""
        if self.timeout_s is None:
            return None
        left = self.arrived + self.timeout_s - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(_NO_TIME)
        return left

    def bound(self, jobs: tuple[Job, ...]) -> tuple[Job, ...]:
        """The jobs with no more time than is left, now that they are submitted. Raises DeadlineExceeded."""
        left = self.left_s()
        if left is None:
            return jobs
        left_ms = max(1, int(left * 1000))
        return tuple(replace(job, budget_ms=min(job.budget_ms or left_ms, left_ms)) for job in jobs)
