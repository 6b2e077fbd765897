"""The client's own timeout: counted from arrival, never longer than the gateway's limit."""

from __future__ import annotations

import time

import pytest

from services.gateway.deadline import Deadline
from services.gateway.errors import DeadlineExceeded
from shared.protocol.messages import Job
from shared.protocol.sampling import SamplingParams


def job(budget_ms: int) -> Job:
    return Job("r", "m", (1,), SamplingParams(max_tokens=1, seed=1), "g", "p", "d", budget_ms=budget_ms)


def test_without_a_timeout_nothing_changes() -> None:
    deadline = Deadline(time.monotonic() - 1000)
    assert deadline.left_s() is None
    assert deadline.bound((job(600), job(0))) == (job(600), job(0))


def test_the_time_since_arrival_is_gone() -> None:
    deadline = Deadline(time.monotonic() - 40, 100)
    left = deadline.left_s()
    assert left is not None
    assert 50 < left <= 60
    budgets = [one.budget_ms for one in deadline.bound((job(600_000), job(0), job(1000)))]
    assert all(50_000 < budget <= 60_000 for budget in budgets[:2])
    assert budgets[2] == 1000, "the gateway's own limit holds"


def test_no_time_is_left() -> None:
    deadline = Deadline(time.monotonic() - 2, 1)
    with pytest.raises(DeadlineExceeded):
        deadline.left_s()
    with pytest.raises(DeadlineExceeded):
        deadline.bound((job(1000),))


def test_a_budget_is_never_none_by_rounding() -> None:
    """0 would mean no limit."""
    (bound,) = Deadline(time.monotonic(), 60).bound((job(0),))
    assert bound.budget_ms > 0
