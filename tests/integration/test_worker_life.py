"""A worker's life on the real bus: it proves itself before it serves, drains, dies, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from shared.protocol.keys import GROUP
from shared.protocol.messages import OUTCOME_FINISHED, Job
from tests.inprocess import Bench, Running, all_ready, unsplit_tokens, workers
from tests.tiny_model import NAME, VOCAB, write_tiny_model

SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 77}
PROMPT = [(11 * i) % (VOCAB - 4) + 3 for i in range(40)]
FAST: dict[str, Any] = {"heartbeat_s": 0.2, "heartbeat_ttl_s": 2.0}
WAIT_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("life") / NAME)


async def until(condition: Callable[[], Awaitable[bool]], pause_s: float = 0.005) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(pause_s)


async def progressed(bench: Bench, job: Job, count: int) -> None:
    """Until the request has `count` tokens; somebody waits for them, so it is no orphan."""

    async def enough() -> bool:
        await bench.registry.beat_gateway("test")
        return len((await bench.journal(job)).choices[0].tokens) >= count

    await until(enough)


async def keys_of(client: Redis, bench: Bench) -> list[str]:
    return [
        key.decode() async for key in client.scan_iter(match=bench.keys.prefix.replace("[", "\\[") + "*", count=500)
    ]


async def streams_of(client: Redis, bench: Bench) -> list[str]:
    return [key for key in await keys_of(client, bench) if ":work:" in key]


async def num_pending(client: Redis, bench: Bench) -> dict[str, int]:
    """Entries of each work stream that were delivered and not acknowledged, where there are any."""
    found = {}
    for stream in await streams_of(client, bench):
        for group in await client.xinfo_groups(stream):
            if group["pending"]:
                found[stream] = int(group["pending"])
    return found


async def immortal(client: Redis, bench: Bench) -> set[str]:
    """Keys that never expire."""
    return {key for key in await keys_of(client, bench) if await client.ttl(key) == -1}


def kept(bench: Bench) -> set[str]:
    """What may stay for ever: the shared work streams, and the lists of workers and gateways while there are any."""
    streams = {
        work(role, NAME) for role in ("prefill", "decode") for work in (bench.keys.work, bench.keys.express_work)
    }
    probes = {bench.keys.probe_work(role, NAME) for role in ("prefill", "decode")}
    return streams | probes | {bench.keys.workers, bench.keys.gateways}


async def nothing_is_left(client: Redis, bench: Bench) -> None:
    await bench.nothing_leaks()
    assert await num_pending(client, bench) == {}
    assert await immortal(client, bench) <= kept(bench)


def decode_worker_of(bench: Bench) -> tuple[Running, Running]:
    """The decode worker that has a running sequence now, and the other one."""
    pair = [running for running in bench.running if running.worker_id.startswith("decode")]
    busy = [running for running in pair if bench.services[running.worker_id].engine.load().running]
    assert len(busy) == 1
    return busy[0], next(running for running in pair if running is not busy[0])


# --- coming up --------------------------------------------------------------------------------------------------------


async def test_a_worker_is_loading_then_probing_then_ready(redis_url: str, deployment: str, model: Path) -> None:
    """Alone it can not prove the whole path and stays in its self-test until the other role is there."""
    async with workers(redis_url, deployment, model, prefill=0, decode=0, redis=FAST) as bench:
        seen: list[str] = []

        async def watch(worker_id: str, until_state: str) -> None:
            async def there() -> bool:
                state = (await bench.states()).get(worker_id)
                if state is not None and (not seen or seen[-1] != state):
                    seen.append(state)
                return state == until_state

            await until(there)

        first = bench.start("prefill")
        await watch(first.worker_id, "probing")
        bench.start("decode")
        await watch(first.worker_id, "ready")
        assert seen == ["loading", "probing", "ready"]


async def test_a_worker_in_self_test_reads_no_users_requests(
    redis_url: str, deployment: str, model: Path, redis_client: Redis
) -> None:
    async with workers(redis_url, deployment, model, prefill=0, decode=0, redis=FAST) as bench:
        lonely = bench.start("prefill")

        async def probing() -> bool:
            return (await bench.states()).get(lonely.worker_id) == "probing"

        await until(probing)
        job = await bench.submit(PROMPT, **SAMPLED)
        consumed: list[int] = []

        async def two_more_reads() -> bool:
            """Its consumer on the probe stream shows that it goes on reading there."""
            for row in await redis_client.xinfo_consumers(bench.keys.probe_work("prefill", NAME), GROUP):
                consumed.append(int(row["idle"]))
            return sum(later < earlier for earlier, later in pairwise(consumed)) >= 2

        await until(two_more_reads)
        (group,) = await redis_client.xinfo_groups(job.prefill_stream)
        assert (group["entries-read"] or 0, group["pending"]) == (0, 0)
        assert await bench.states() == {lonely.worker_id: "probing"}
        bench.start("decode")
        state = await bench.ended(job)
        assert state.choices[0].tokens == unsplit_tokens(model, [PROMPT], **SAMPLED)[0]


async def test_self_tests_leave_nothing_that_stays(
    redis_url: str, deployment: str, model: Path, redis_client: Redis
) -> None:
    async with workers(redis_url, deployment, model, prefill=2, decode=2, redis=FAST) as bench:

        async def refreshed() -> bool:
            return await immortal(redis_client, bench) <= kept(bench)

        await until(refreshed)
        names = await keys_of(redis_client, bench)
        assert sum(":req:selftest-" in name for name in names) >= 4
        await nothing_is_left(redis_client, bench)
    left = await keys_of(redis_client, bench)
    assert not [name for name in left if "@" in name], "private streams go with their workers"
    assert bench.keys.workers not in left
    assert not [name for name in left if ":worker:" in name]


# --- leaving ----------------------------------------------------------------------------------------------------------


async def test_a_drain_finishes_what_runs(redis_url: str, deployment: str, model: Path, redis_client: Redis) -> None:
    expected = unsplit_tokens(model, [PROMPT], **SAMPLED, max_tokens=300)[0]
    async with workers(redis_url, deployment, model, decode=2, redis=FAST, drain_timeout_s=30) as bench:
        job = await bench.submit(PROMPT, **SAMPLED, max_tokens=300)
        await progressed(bench, job, 5)
        leaving, staying = decode_worker_of(bench)
        before = await bench.journal(job)
        leaving.stop.set()
        state = await bench.ended(job)
        assert before.end is None, "it ended before the drain began"
        assert state.choices[0].tokens == expected
        assert state.end is not None
        assert state.end.usage.decode_worker == leaving.worker_id, "it was to be finished where it ran"
        assert state.epoch == before.epoch
        async with asyncio.timeout(WAIT_S):
            await leaving.task
        assert leaving.worker_id not in await bench.states()
        after = await bench.generate(PROMPT, **SAMPLED)
        assert after.end is not None
        assert after.end.usage.decode_worker == staying.worker_id
        await nothing_is_left(redis_client, bench)


async def test_what_a_drain_has_no_time_for_goes_to_another_worker(
    redis_url: str, deployment: str, model: Path, redis_client: Redis
) -> None:
    expected = unsplit_tokens(model, [PROMPT], **SAMPLED, max_tokens=900)[0]
    async with workers(redis_url, deployment, model, decode=2, redis=FAST, drain_timeout_s=0.05) as bench:
        job = await bench.submit(PROMPT, **SAMPLED, max_tokens=900)
        await progressed(bench, job, 5)
        leaving, staying = decode_worker_of(bench)
        before = await bench.journal(job)
        leaving.stop.set()
        async with asyncio.timeout(WAIT_S):
            await leaving.task
        state = await bench.ended(job)
        assert state.choices[0].tokens == expected
        assert state.end is not None
        assert (state.end.outcome, state.end.usage.decode_worker) == (OUTCOME_FINISHED, staying.worker_id)
        assert state.epoch > before.epoch
        await nothing_is_left(redis_client, bench)


async def test_a_prefill_worker_that_drains_hands_its_prompts_back(
    redis_url: str, deployment: str, model: Path, redis_client: Redis
) -> None:
    prompts = [[(17 * i + j) % (VOCAB - 4) + 3 for j in range(800)] for i in range(6)]
    expected = unsplit_tokens(model, prompts, **SAMPLED)
    engine = {"max_num_batched_tokens": 16, "kv_cache_tokens": 8192}
    async with workers(
        redis_url, deployment, model, prefill=2, redis=FAST, engine=engine, drain_timeout_s=0.05
    ) as bench:
        jobs = [await bench.submit(prompt, **SAMPLED) for prompt in prompts]
        await bench.until(lambda: any(service.in_flight for service in bench.prefill))
        busy = next(service for service in bench.prefill if service.in_flight)
        leaving = next(running for running in bench.running if bench.services[running.worker_id] is busy)
        leaving.stop.set()
        states = [await bench.ended(job) for job in jobs]
        assert [state.choices[0].tokens for state in states] == expected
        async with asyncio.timeout(WAIT_S):
            await leaving.task
        await nothing_is_left(redis_client, bench)


# --- dying ------------------------------------------------------------------------------------------------------------


async def die(running: Running) -> None:
    """Gone without a word: no more heartbeats, its entries stay with it."""
    running.task.cancel()
    await asyncio.wait([running.task], timeout=WAIT_S)
    assert running.task.done()


async def test_a_dead_decode_worker_is_swept_and_its_stream_goes_on(
    redis_url: str, deployment: str, model: Path, redis_client: Redis
) -> None:
    expected = unsplit_tokens(model, [PROMPT], **SAMPLED, max_tokens=900)[0]
    async with workers(redis_url, deployment, model, decode=2, redis=FAST) as bench:
        job = await bench.submit(PROMPT, **SAMPLED, max_tokens=900)
        await progressed(bench, job, 5)
        victim, heir = decode_worker_of(bench)
        await die(victim)
        at_death = await bench.journal(job)
        assert at_death.end is None, "it died too late to prove anything"
        assert sum((await num_pending(redis_client, bench)).values()) == 1
        state = await bench.ended(job)
        assert state.choices[0].tokens == expected
        assert state.end is not None
        assert state.end.usage.decode_worker == heir.worker_id
        assert state.epoch > at_death.epoch

        async def swept_once() -> bool:
            beats = await bench.registry.live()
            return max(beat.dead_workers_swept for beat in beats) == sum(beat.requests_swept for beat in beats) == 1

        await until(swept_once)
        bench.services.pop(victim.worker_id)
        assert await num_pending(redis_client, bench) == {}
        await _forgotten(redis_client, bench, victim)
        assert await immortal(redis_client, bench) <= kept(bench)


async def test_the_last_decode_worker_is_swept_by_prefill_and_replaced(
    redis_url: str, deployment: str, model: Path, redis_client: Redis
) -> None:
    expected = unsplit_tokens(model, [PROMPT], **SAMPLED, max_tokens=900)[0]
    async with workers(redis_url, deployment, model, redis=FAST) as bench:
        job = await bench.submit(PROMPT, **SAMPLED, max_tokens=900)
        await progressed(bench, job, 5)
        victim = next(running for running in bench.running if running.worker_id.startswith("decode"))
        before = await bench.journal(job)
        await die(victim)

        async def swept() -> bool:
            await bench.registry.beat_gateway("test")
            return (await bench.journal(job)).epoch > before.epoch

        await until(swept)
        heir = bench.start("decode")
        state = await bench.ended(job)
        assert state.choices[0].tokens == expected
        assert state.end is not None
        assert state.end.usage.decode_worker == heir.worker_id
        await all_ready(bench, 2)
        assert await num_pending(redis_client, bench) == {}
        await _forgotten(redis_client, bench, victim)


async def _forgotten(client: Redis, bench: Bench, victim: Running) -> None:
    """The dead worker's name goes from the streams that others read."""

    async def gone() -> bool:
        rows = await client.xinfo_consumers(bench.keys.work("decode", NAME), GROUP)
        return victim.worker_id not in {row["name"].decode() for row in rows}

    await until(gone, 0.05)
