"""What a worker leaves behind: by order, out of time, with an engine that hangs, and what a standstill does to it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from shared import faultpoints
from shared.bus.connection import as_text, connect
from shared.bus.draining import DrainOrders
from shared.bus.registry import Registry
from shared.lifecycle import EXIT_FAILED, EXIT_OK
from shared.protocol.keys import GROUP, Keys
from shared.protocol.messages import OUTCOME_FINISHED, WorkerBeat
from tests.cluster import Cluster
from tests.inprocess import Bench, Running, unsplit_tokens, workers
from tests.integration.test_worker_life import FAST, PROMPT, decode_worker_of, nothing_is_left, progressed
from tests.tiny_model import NAME, VOCAB, write_tiny_model

SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 78}
WAIT_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("leaving") / NAME)


async def consumers(client: Redis, bench: Bench) -> set[str]:
    """Every name in the groups of the shared work streams."""
    names = set()
    for role in ("prefill", "decode"):
        for stream in (work(role, NAME) for work in (bench.keys.work, bench.keys.express_work, bench.keys.probe_work)):
            names |= {row["name"].decode() for row in await client.xinfo_consumers(stream, GROUP)}
    return names


async def ended(running: Running) -> None:
    async with asyncio.timeout(WAIT_S):
        await running.task


async def test_an_order_drains_and_takes_the_name_off_every_list(
    redis_url: str, deployment: str, model: Path, redis_client: Redis
) -> None:
    expected = unsplit_tokens(model, [PROMPT], **SAMPLED, max_tokens=300)[0]
    async with workers(redis_url, deployment, model, decode=2, redis=FAST, drain_timeout_s=30) as bench:
        job = await bench.submit(PROMPT, **SAMPLED, max_tokens=300)
        await progressed(bench, job, 5)
        leaving, staying = decode_worker_of(bench)
        assert {leaving.worker_id, staying.worker_id} <= await consumers(redis_client, bench)
        await DrainOrders(redis_client, bench.keys).give(leaving.worker_id)
        await ended(leaving)
        state = await bench.ended(job)
        assert state.choices[0].tokens == expected
        assert state.end is not None
        assert state.end.usage.decode_worker == leaving.worker_id, "it had the time to finish"
        assert leaving.worker_id not in await consumers(redis_client, bench)
        assert staying.worker_id in await consumers(redis_client, bench)
        assert leaving.worker_id not in await bench.states()
        assert not await redis_client.exists(bench.keys.drain(leaving.worker_id))
        await nothing_is_left(redis_client, bench)


async def test_what_was_computed_is_journaled_before_it_is_given_back(
    redis_url: str, deployment: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The appends of the leaving worker are held up; it has to wait for them, or the next one samples them again."""
    async with workers(redis_url, deployment, model, decode=2, redis=FAST, drain_timeout_s=0.05) as bench:
        job = await bench.submit(PROMPT, **SAMPLED, max_tokens=600)
        await progressed(bench, job, 5)
        leaving, _ = decode_worker_of(bench)
        service = bench.services[leaving.worker_id]
        store = service._context.store
        append, requeue, lengths = store.append, store.requeue, []

        async def slow_append(appends: Any) -> Any:
            await asyncio.sleep(0.1)
            return await append(appends)

        async def watched_requeue(lease: Any) -> bool:
            sequences = list(service._journaler._requests)  # type: ignore[union-attr]
            computed = len(sequences[0].tokens) - sequences[0].prompt_len
            lengths.append((computed, len((await bench.journal(job)).choices[0].tokens)))
            return await requeue(lease)

        monkeypatch.setattr(store, "append", slow_append)
        monkeypatch.setattr(store, "requeue", watched_requeue)
        leaving.stop.set()
        await ended(leaving)
        assert len(lengths) == 1
        assert lengths[0][0] == lengths[0][1] > 5
        assert (await bench.ended(job)).choices[0].tokens == unsplit_tokens(model, [PROMPT], **SAMPLED, max_tokens=600)[
            0
        ]


async def test_an_entry_nobody_serves_any_more_goes_back_at_once(
    redis_url: str, deployment: str, model: Path, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One suspect is computed, the others wait for their turn when their prefill worker has to leave."""
    engine = {"max_num_batched_tokens": 16, "kv_cache_tokens": 8192}
    prompts = [[(17 * i + j) % (VOCAB - 4) + 3 for j in range(800)] for i in range(3)]
    async with workers(redis_url, deployment, model, redis=FAST, engine=engine, drain_timeout_s=0.05) as bench:
        first = bench.running[0]
        lost: list[str] = []

        def lose_three(name: str) -> None:
            if name == "prefill.begun" and len(lost) < 3:
                lost.append(name)
                raise asyncio.CancelledError

        monkeypatch.setattr(faultpoints, "fault_point", lose_three)
        jobs = [await bench.submit(prompt, **SAMPLED) for prompt in prompts]
        await bench.until(lambda: len(lost) == 3)
        for job in jobs:
            entry = await redis_client.hget(bench.keys.request(job.request_id), "entry")
            assert entry is not None
            await bench.store.sweep(job.prefill_stream, as_text(entry), job.request_id, counted=True)
        service = bench.services[first.worker_id]
        await bench.until(lambda: len(first.worker._claimed) >= 2 and service.in_flight > 0)
        assert service.in_flight == 1, "suspects are computed one at a time"
        first.stop.set()
        bench.start("prefill")
        await ended(first)
        states = [await bench.ended(job) for job in jobs]
        assert [state.end and state.end.outcome for state in states] == [OUTCOME_FINISHED] * 3
        assert first.worker_id not in await consumers(redis_client, bench)


# ---- real processes: engines that hang, standstills ------------------------------------------------


@pytest.fixture
def cluster(model: Path, tmp_path: Path) -> Iterator[Cluster]:
    settings = {"SLIPSTREAM_ENGINE__HANG_TIMEOUT_S": "6", "SLIPSTREAM_LOG_FORMAT": "json"}
    with Cluster(tmp_path / "cluster", str(model), decode=2, settings=settings) as cluster:
        yield cluster


def beats(cluster: Cluster) -> dict[int, WorkerBeat]:
    """Heartbeats by process id."""

    async def read() -> list[WorkerBeat]:
        async with connect(cluster.redis_url) as client:
            return await Registry(client, Keys("default")).live()

    return {beat.pid: beat for beat in asyncio.run(read())}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_hung_engine_is_told_and_ends_its_process_and_a_standstill_is_survived(cluster: Cluster) -> None:
    first, second = cluster.of_role("decode")
    prefill = cluster.of_role("prefill")[0]
    expected = cluster.complete("hello", max_tokens=8, temperature=0, ignore_eos=True)["choices"][0]["token_ids"]

    os.kill(second.pid, signal.SIGSTOP)
    cluster.wait_for(lambda: second.pid not in beats(cluster), "the stopped worker's heartbeat to expire")
    answer = cluster.complete("hello", max_tokens=8, temperature=0, ignore_eos=True)["choices"][0]
    assert answer["token_ids"] == expected
    os.kill(second.pid, signal.SIGCONT)
    cluster.wait_for(lambda: second.pid in beats(cluster), "it to beat again")
    cluster.wait_for(lambda: "worker_stood_still" in second.log_text(), "it to notice")
    assert beats(cluster)[second.pid].state == "ready"

    faults = cluster.folder / "faults"
    faults.write_text("")
    hanging = cluster.start("decode", SLIPSTREAM_FAULT_POINTS=f"@{faults}")
    cluster.wait_for(lambda: hanging.pid in beats(cluster) and beats(cluster)[hanging.pid].state == "ready", "a third")
    for process in (first, second):
        process.popen.terminate()
        assert process.popen.wait(WAIT_S) == EXIT_OK
    faults.write_text("engine.step:hang")
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(cluster.complete, "hello", max_tokens=8, temperature=0, ignore_eos=True)
        cluster.wait_for(lambda: beats(cluster)[hanging.pid].state == "stalled", "the hanging worker to be stalled")
        cluster.wait_for(lambda: cluster.status("/health") == 503, "readiness to fail with the last decode worker")
        assert hanging.popen.wait(WAIT_S) == EXIT_FAILED
        assert "the engine made no turn" in hanging.log_text()
        cluster.processes.remove(hanging)
        cluster.start("decode")
        assert reader.result(WAIT_S)["choices"][0]["token_ids"] == expected
    assert prefill.popen.poll() is None
