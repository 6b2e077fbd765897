"""A request whose handling raises: it ends with an error after a few tries, and the worker lives on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from services.prefill.worker import PrefillService
from shared.bus.requests import MAX_DEATHS
from shared.bus.results import Begun
from shared.protocol.messages import OUTCOME_ERROR, OUTCOME_FINISHED
from shared.worker.probation import Start
from tests.inprocess import workers
from tests.tiny_model import write_tiny_model

BAD_PROMPT = [13] * 13


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def spoil(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> list[str]:
    """Make the prefill service raise for `BAD_PROMPT`, at most `times` times; returns the request ids it did so for."""
    raised: list[str] = []
    serve = PrefillService._serve

    async def serve_or_raise(self: PrefillService, begun: Begun, start: Start) -> None:
        if list(begun.job.prompt_ids) == BAD_PROMPT and len(raised) < times:
            raised.append(begun.lease.request_id)
            raise ExceptionGroup("as a task group raises it", [error])
        await serve(self, begun, start)

    monkeypatch.setattr(PrefillService, "_serve", serve_or_raise)
    return raised


async def test_a_request_that_fails_everywhere_ends_in_an_error(
    redis_url: str, deployment: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with workers(redis_url, deployment, model) as bench:
        raised = spoil(monkeypatch, RuntimeError("a bug"), times=100)
        state = await bench.generate(BAD_PROMPT)
        assert state.end is not None
        assert state.end.outcome == OUTCOME_ERROR
        assert len(raised) == MAX_DEATHS
        good: Any = await bench.generate([5, 6, 7])
        assert good.end.outcome == OUTCOME_FINISHED
        await bench.nothing_leaks()


async def test_a_redis_error_in_mid_request_is_swept_back_and_costs_nothing(
    redis_url: str, deployment: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with workers(redis_url, deployment, model) as bench:
        expected = (await bench.generate(BAD_PROMPT)).choices[0].tokens
        raised = spoil(monkeypatch, RedisConnectionError("cut"), times=1)
        state = await bench.generate(BAD_PROMPT)
        assert len(raised) == 1
        assert state.end is not None
        assert state.end.outcome == OUTCOME_FINISHED
        assert state.choices[0].tokens == expected
