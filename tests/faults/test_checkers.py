"""Every checker of the harness, with the fault really there: it fires; and without it: it does not."""

from __future__ import annotations

import copy
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from services.gateway.metrics import OUTCOME_REJECTED, GatewayMetrics
from shared.bus.connection import connect
from shared.bus.embedded import EmbeddedServer
from shared.protocol.keys import Keys
from shared.protocol.messages import WorkerBeat
from tests.engine_fakes import make_engine
from tests.faults import invariants
from tests.faults.campaign import Disturbance
from tests.faults.client import FAILED, FINISHED, Record
from tests.faults.invariants import Footprint
from tests.faults.memory import MIN_REQUESTS, PARTS, WARM_UP_REQUESTS, MemoryTrace, memory_flat
from tests.faults.report import recovery_times
from tests.faults.requests import COMPLETION, Answer, ChoiceAnswer, Spec, make_specs
from tests.integration.bus_helpers import Bench

SPEC = Spec(0, COMPLETION, {}, stream=True)
TOKENS = [11, 12, 13, 13, 14, 15]


def answer() -> Answer:
    return {0: ChoiceAnswer(list(TOKENS), "abcdef", [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6], ["length:None"])}


def record() -> Record:
    made = Record(SPEC, started=100.0, response_id="cmpl-1", ends=[FINISHED], answer=answer())
    made.events = [(f"1-{event}", 100.0 + event / 10) for event in range(1, 7)]
    return made


def integrity(changed: Record) -> list[str]:
    return invariants.token_integrity([changed], {0: answer()})


def test_an_undisturbed_record_violates_nothing() -> None:
    assert invariants.one_ending([record()]) == []
    assert integrity(record()) == []
    assert invariants.event_order([record()]) == []


def drop(tokens: list[int]) -> None:
    del tokens[2]


def drop_last(tokens: list[int]) -> None:
    tokens.pop()


def double(tokens: list[int]) -> None:
    tokens.insert(5, tokens[4])


def swap(tokens: list[int]) -> None:
    tokens[1], tokens[2] = tokens[2], tokens[1]


def change(tokens: list[int]) -> None:
    tokens[1] = 99


@pytest.mark.parametrize(
    ("harm", "word"),
    [(drop, "lost"), (drop_last, "lost"), (double, "doubled"), (swap, "reordered"), (change, "different")],
)
def test_a_changed_token_is_noticed_and_named(harm: Callable[[list[int]], None], word: str) -> None:
    changed = record()
    harm(changed.answer[0].tokens)
    assert any(f"token {word}" in violation for violation in integrity(changed))


def test_changed_text_scores_and_finish_are_noticed() -> None:
    for harm in (
        lambda choice: setattr(choice, "text", "abcdeF"),
        lambda choice: choice.scores.pop(),
        lambda choice: setattr(choice, "finish_reasons", ["stop:None"]),
    ):
        changed = record()
        harm(changed.answer[0])
        assert len(integrity(changed)) == 1


def test_a_missing_choice_is_noticed() -> None:
    changed = record()
    changed.answer = {1: changed.answer[0]}
    assert integrity(changed)


@pytest.mark.parametrize("ends", [[], [FINISHED, FINISHED], [FAILED]])
def test_none_two_and_bad_endings_are_noticed(ends: list[str]) -> None:
    changed = record()
    changed.ends = ends
    assert invariants.one_ending([changed])


@pytest.mark.parametrize("finishes", [[], ["stop:None", "stop:None"]])
def test_a_choice_without_its_one_finish_is_noticed(finishes: list[str]) -> None:
    changed = record()
    changed.answer[0].finish_reasons = finishes
    assert invariants.one_ending([changed])


def test_events_that_go_back_or_come_twice_are_noticed() -> None:
    changed = record()
    changed.events[2], changed.events[3] = changed.events[3], changed.events[2]
    assert invariants.event_order([changed])
    changed = record()
    changed.events = [*changed.events, changed.events[-1], changed.events[-1]]
    assert invariants.event_order([changed])


# --- blocks, work, keys -----------------------------------------------------------------------------------------------


def beat_of(used: int) -> WorkerBeat:
    return WorkerBeat("w", "decode", "ready", "m", "", "", kv_tokens=64, kv_tokens_used=used)


def test_one_leaked_block_is_noticed() -> None:
    engine, _ = make_engine()
    assert invariants.blocks_free([beat_of(engine.load().kv_tokens_used)]) == []
    engine.blocks.allocate(1)
    assert invariants.blocks_free([beat_of(engine.load().kv_tokens_used)])


def test_a_forgotten_sequence_is_noticed() -> None:
    assert invariants.blocks_free([replace(beat_of(0), running=1)])
    assert invariants.blocks_free([replace(beat_of(0), waiting=1)])


@pytest_asyncio.fixture
async def own_redis() -> AsyncIterator[Redis]:
    """A server of its own, for these checkers look at every key."""
    with EmbeddedServer() as server:
        client = connect(server.url)
        yield client
        await client.aclose()


async def test_a_pending_and_an_unread_entry_are_noticed(own_redis: Redis) -> None:
    bench = Bench.of(own_redis, Keys("t"))
    queue = bench.queue("w1")
    await queue.ensure()
    assert await invariants.nothing_pending(own_redis) == []
    await bench.store.submit(bench.job())
    assert await invariants.nothing_pending(own_redis)
    assert await queue.read(1, 0)
    (violation,) = await invariants.nothing_pending(own_redis)
    assert "1 pending" in violation


async def test_a_key_without_time_to_live_is_noticed(own_redis: Redis) -> None:
    bench = Bench.of(own_redis, Keys("t"))
    await bench.store.submit(bench.job("r1"))
    await own_redis.sadd(bench.keys.workers, "w1")
    assert await invariants.keys_expire(own_redis) == []
    await own_redis.persist(bench.keys.log("r1"))
    assert len(await invariants.keys_expire(own_redis)) == 1


async def test_a_request_that_never_ends_is_noticed(own_redis: Redis) -> None:
    bench = Bench.of(own_redis, Keys("t"))
    await bench.store.submit(bench.job("r1"))
    assert await invariants.requests_ended(own_redis)
    await bench.store.cancel("r1", "client_gone", force=True)
    assert await invariants.requests_ended(own_redis) == []


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that opens a file for each line it reads, and says so."""
    program = (
        "import sys\nheld = []\nfor line in sys.stdin:\n    held.append(open('/dev/null'))\n    print(1, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process


def open_one(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    child.stdout.readline()


def test_open_descriptors_are_noticed(child: subprocess.Popen[str]) -> None:
    open_one(child)
    before = invariants.footprint(child.pid, [])
    assert invariants.footprints_steady([before], [invariants.footprint(child.pid, [])]) == []
    for _ in range(invariants.DESCRIPTOR_SLACK + 1):
        open_one(child)
    assert invariants.footprints_steady([before], [invariants.footprint(child.pid, [])])


def test_links_to_redis_are_left_out_of_the_descriptors() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        port = server.getsockname()[1]
        with_link = invariants.footprint(os.getpid(), []).descriptors
        assert invariants.footprint(os.getpid(), [port]).descriptors < with_link


def test_tasks_that_stay_are_noticed() -> None:
    dump = "Stack for <Task pending name='a'>\n  File x\nStack for <Task pending name='b'>\n"
    assert invariants.tasks_in(dump) == 2
    before, after = Footprint(7, 10, 2, 100, tasks=5), Footprint(7, 10, 2, 100, tasks=5 + invariants.TASK_SLACK + 1)
    assert invariants.footprints_steady([before], [before]) == []
    assert invariants.footprints_steady([before], [after])


ENOUGH = WARM_UP_REQUESTS + 2 * MIN_REQUESTS


def trace(kib_at: Callable[[int], float], last: int = ENOUGH) -> MemoryTrace:
    return MemoryTrace(7, "decode-0", [(served, 50_000 + int(kib_at(served))) for served in range(0, last + 1, 50)])


def test_memory_kept_of_every_request_is_noticed() -> None:
    assert trace(lambda served: 0.3 * served).kib_per_1000_requests() == pytest.approx(300, rel=0.05)
    assert len(memory_flat([trace(lambda served: 0.3 * served)])) == 1
    assert memory_flat([trace(lambda _: 0), trace(lambda served: 0.05 * served)]) == []


def test_memory_of_each_request_is_noticed_among_steps_and_noise() -> None:
    noise = random.Random(1)
    assert memory_flat([trace(lambda served: 0.3 * served + 2000 * (served > 5000) + noise.randrange(100))])


@pytest.mark.parametrize(
    "kib_at",
    [
        pytest.param(lambda served: 3.0 * min(served, WARM_UP_REQUESTS), id="only while warming up"),
        pytest.param(lambda served: 2300.0 * (served > 4000) + 2300.0 * (served > 6000), id="steps"),
        pytest.param(lambda served: -0.3 * served, id="less and less"),
    ],
)
def test_memory_that_is_taken_once_is_no_leak(kib_at: Callable[[int], float]) -> None:
    found = trace(kib_at)
    assert found.kib_per_1000_requests() is not None
    assert memory_flat([found]) == []


def test_nothing_is_said_of_a_process_that_served_too_little() -> None:
    assert trace(lambda served: served, last=WARM_UP_REQUESTS + MIN_REQUESTS // 2).kib_per_1000_requests() is None
    assert MemoryTrace(7, "decode-0").kib_per_1000_requests() is None
    few_looks = MemoryTrace(7, "decode-0", [(served, served) for served in range(0, ENOUGH, 1000)])
    assert few_looks.kib_per_1000_requests() is None


@pytest.mark.parametrize("leaks", [True, False])
def test_a_process_that_really_leaks_is_told_from_one_that_does_not(leaks: bool) -> None:
    kept = "held.append(bytearray(os.urandom(200 << 10)))" if leaks else "bytearray(os.urandom(200 << 10))"
    program = f"import os, sys\nheld = []\nfor line in sys.stdin:\n    {kept}\n    print(1, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        found = MemoryTrace(process.pid, "child")
        for served in range(0, WARM_UP_REQUESTS + 10 * PARTS * 1000, 1000):
            open_one(process)
            found.samples.append((served, invariants.memory_kib(process.pid)))
    assert bool(memory_flat([found])) is leaks


# --- metrics ----------------------------------------------------------------------------------------------------------


def page(*, skip_outcome: bool = False, in_flight: int = 0) -> str:
    metrics = GatewayMetrics("m")
    for _ in range(3):
        metrics.received.inc()
    metrics.outcomes.labels("/r", "finished").inc(2)
    if not skip_outcome:
        metrics.outcomes.labels("/r", OUTCOME_REJECTED).inc()
    metrics.in_flight.set(in_flight)
    metrics.num_generated += 6
    return metrics.render().decode()


def test_a_skipped_counter_is_noticed() -> None:
    assert invariants.metrics_add_up(page()) == []
    assert invariants.metrics_add_up(page(skip_outcome=True))
    assert invariants.metrics_add_up(page(skip_outcome=True, in_flight=1))


def test_tokens_that_were_not_counted_are_noticed() -> None:
    assert invariants.tokens_counted([page()], [record()]) == []
    assert invariants.tokens_counted([page()], [record(), record()])


# --- the load and the figures -----------------------------------------------------------------------------------------


def test_a_seed_decides_the_requests_and_they_cover_every_feature() -> None:
    specs = make_specs(64, 1)
    assert specs == make_specs(64, 1)
    assert specs != make_specs(64, 2)
    bodies = [spec.body for spec in specs]
    for name in ("n", "stop", "logprobs", "presence_penalty"):
        assert any(name in body for body in bodies), name
    assert {spec.path for spec in specs} == {spec.path for spec in specs if spec.stream}


def test_recovery_is_counted_from_the_first_fault_after_the_last_token() -> None:
    moved = record()
    moved.events = [("1-1", 101.0), ("1-2", 102.0), ("3-1", 109.0)]
    faults = [Disturbance("kill", "w", at, at) for at in (100.5, 103.0, 105.0)]
    assert recovery_times([moved], faults) == [6.0]
    assert recovery_times([record()], faults) == []


def test_a_record_is_not_changed_by_looking_at_it() -> None:
    before = record()
    after = copy.deepcopy(before)
    invariants.one_ending([after])
    integrity(after)
    assert before == after


def test_the_raw_file_of_a_process_is_read_from_proc() -> None:
    own = invariants.footprint(os.getpid(), [])
    assert own.descriptors >= 3
    assert own.threads >= 1
    assert own.memory_kib > 1000
