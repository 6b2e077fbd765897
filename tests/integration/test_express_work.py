"""Work that goes first: served like any other, by workers that have no room for more of the other kind."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from services.prefill.worker import PrefillService
from shared.protocol.keys import Keys
from shared.protocol.messages import OUTCOME_FINISHED, PATH_REMOTE, Job
from tests.engine_fakes import make_sequence
from tests.inprocess import workers
from tests.tiny_model import NAME, write_tiny_model

PROMPT = [3 + 5 * i % 200 for i in range(40)]
BUDGET = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / NAME)


def put_first(keys: Keys, job: Job) -> Job:
    prefill, decode = (keys.express_work(role, job.model) for role in ("prefill", "decode"))
    return replace(job, prefill_stream=prefill, decode_stream=decode, priority=-1)


def rooms(service: PrefillService) -> tuple[int, int]:
    """For ordinary work, and for what goes first."""
    return service.room(), service.room(express=True)


async def test_it_is_served_as_any_other(redis_url: str, deployment: str, model: Path) -> None:
    async with workers(redis_url, deployment, model) as bench:
        expected = await bench.generate(PROMPT)
        job = put_first(bench.keys, bench.job(PROMPT))
        await bench.store.submit(job)
        state = await bench.ended(job)
        assert state.choices[0].tokens == expected.choices[0].tokens
        assert state.end is not None
        assert (state.end.outcome, state.end.usage.path) == (OUTCOME_FINISHED, PATH_REMOTE)
        await bench.nothing_leaks()


async def test_what_a_prefill_worker_has_to_compute_does_not_keep_it_out(
    redis_url: str, deployment: str, model: Path
) -> None:
    async with workers(redis_url, deployment, model, engine={"max_num_batched_tokens": BUDGET}) as bench:
        (service,) = bench.prefill
        assert rooms(service) == (4, 4)
        service._outputs[make_sequence([7] * BUDGET)] = asyncio.Queue()
        assert rooms(service) == (0, 4)
        service._outputs.clear()


async def test_its_number_is_bounded_too(redis_url: str, deployment: str, model: Path) -> None:
    """Prompts that are computed and wait for a decode worker take up places."""
    async with workers(redis_url, deployment, model) as bench:
        (service,) = bench.prefill
        seen = []
        for _ in range(20):
            computed = make_sequence([7])
            computed.num_computed = 1
            service._outputs[computed] = asyncio.Queue()
            seen.append(rooms(service))
        assert seen[14:] == [(1, 4), (0, 4), (0, 3), (0, 2), (0, 1), (0, 0)]
        service._outputs.clear()
