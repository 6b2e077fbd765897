"""One fault each, on real processes: what the client sees is what it would have seen without it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from shared.bus.script import Script
from tests.faults import invariants
from tests.faults.client import FINISHED, Client, Record
from tests.faults.cluster import FaultCluster, Slot, Topology
from tests.faults.proxy import Behaviour, Direction, Kind
from tests.faults.requests import COMPLETION, Spec, differences
from tests.faults.spawner import ended

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

HEARTBEAT_TTL_S = 1.5
WAIT_S = 40.0
KEEP_MS = 130_000
TOPOLOGY = Topology(
    gateways=1,
    prefill=2,
    decode=2,
    proxied=True,
    settings={
        "SLIPSTREAM_REDIS__HEARTBEAT_TTL_S": str(HEARTBEAT_TTL_S),
        "SLIPSTREAM_TRANSFER__TRANSPORTS": "tcp",
        "SLIPSTREAM_TRANSFER__PROGRESS_TIMEOUT_S": "2",
    },
)
PROMPT = [3 + (7 * i) % 500 for i in range(200)]
BODY = {"prompt": PROMPT, "temperature": 1.0, "seed": 77, "ignore_eos": True, "return_token_ids": True, "logprobs": 1}


class Stage:
    """The cluster of this module, and what an undisturbed client gets from it."""

    def __init__(self, cluster: FaultCluster, http: aiohttp.ClientSession) -> None:
        self.cluster = cluster
        self.client = Client(http, lambda: [slot.url for slot in cluster.of_role("gateway")])
        self._answers: dict[int, Record] = {}

    async def begin(self, spec: Spec, after: int = 5) -> tuple[asyncio.Task[Record], Record]:
        """The request undisturbed, then the same once more: a task, when `after` events of it are there."""
        if spec.number not in self._answers:
            self._answers[spec.number] = await self.client.ask(spec)
        record = Record(spec, time.monotonic())
        task = asyncio.create_task(self.client.ask(spec, record=record))
        await self.until(lambda: _so(len(record.events) >= after), "the first events")
        return task, self._answers[spec.number]

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        await self.cluster.until(condition, what, WAIT_S)

    async def worker_of(self, role: str) -> Slot:
        """The slot of the worker that owns a request now: a fast machine is through with it between two heartbeats."""
        found: list[Slot] = []

        async def look() -> bool:
            owners = await self.cluster.owners(state=role)
            busy = {beat.pid for beat in await self.cluster.beats() if beat.worker_id in owners}
            found[:] = [slot for slot in self.cluster.of_role(role) if slot.pid in busy]
            return bool(found)

        await self.until(look, f"a busy {role} worker")
        return found[0]

    async def at_rest(self) -> list[str]:
        """What is still held when nothing should be."""
        client, held = self.cluster.redis.client, ["not looked yet"]

        async def look() -> bool:
            held[:] = invariants.blocks_free(await self.cluster.beats()) + await invariants.nothing_pending(client)
            held.extend(await invariants.requests_ended(client, KEEP_MS))
            return not held

        try:
            await self.until(look, "everything to be let go")
        except AssertionError:
            return held
        return held + await invariants.keys_expire(client)


async def _so(value: bool) -> bool:
    return value


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    folder = tmp_path_factory.mktemp("directed")
    async with (
        FaultCluster(folder, str(tiny_model), TOPOLOGY) as cluster,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        yield Stage(cluster, http)


@pytest_asyncio.fixture(loop_scope="module")
async def stage(running: Stage) -> AsyncIterator[Stage]:
    """Ready before each test; after it, nothing is held anywhere."""
    await running.cluster.ready()
    yield running
    await running.cluster.ready()
    assert await running.at_rest() == []


def spec(number: int, max_tokens: int = 600) -> Spec:
    return Spec(number, COMPLETION, BODY | {"max_tokens": max_tokens, "seed": number}, stream=True)


async def same(task: asyncio.Task[Record], undisturbed: Record) -> Record:
    """The disturbed request's record, which has the undisturbed one's answer."""
    record = await task
    assert record.outcome == FINISHED, record.error
    assert differences(record.answer, undisturbed.answer) == []
    assert invariants.event_order([record]) == []
    return record


def epochs(record: Record) -> list[int]:
    return [int(event_id.partition("-")[0]) for event_id, _ in record.events]


async def test_a_worker_that_stood_still_past_its_heartbeat_is_fenced(stage: Stage) -> None:
    task, undisturbed = await stage.begin(spec(1))
    zombie = await stage.worker_of("decode")
    assert zombie.child is not None
    zombie.child.stop()
    gone = zombie.pid

    async def is_missed() -> bool:
        return gone not in {beat.pid for beat in await stage.cluster.beats()}

    await stage.until(is_missed, "its heartbeat to expire")
    record = await same(task, undisturbed)
    assert max(epochs(record)) > 1
    zombie.child.go_on()
    assert zombie.child.is_alive


async def test_a_zombie_that_wakes_up_while_its_successor_works_changes_nothing(stage: Stage) -> None:
    task, undisturbed = await stage.begin(spec(2, 700))
    zombie = await stage.worker_of("decode")
    assert zombie.child is not None
    zombie.child.stop()
    first = zombie.pid

    async def is_taken_over() -> bool:
        owners = await stage.cluster.owners(state="decode")
        return any(beat.pid != first and beat.worker_id in owners for beat in await stage.cluster.beats())

    await stage.until(is_taken_over, "another worker to go on")
    zombie.child.go_on()
    assert max(epochs(await same(task, undisturbed))) > 1


async def test_redis_restarts_with_its_journal(stage: Stage) -> None:
    task, undisturbed = await stage.begin(spec(3))
    await stage.cluster.redis.kill()
    await stage.cluster.redis.start()
    await same(task, undisturbed)


async def test_redis_forgets_everything(stage: Stage) -> None:
    task, undisturbed = await stage.begin(spec(4))
    await stage.cluster.redis.wipe()
    record = await same(task, undisturbed)
    assert max(epochs(record)) > 1


async def test_every_connection_to_redis_is_cut(stage: Stage) -> None:
    task, undisturbed = await stage.begin(spec(5))
    await stage.cluster.redis.cut_connections()
    await same(task, undisturbed)


async def test_the_reply_to_a_submission_is_lost(stage: Stage) -> None:
    """The gateway sends it again; there is one request all the same."""
    (gateway,) = stage.cluster.of_role("gateway")
    undisturbed = await stage.client.ask(spec(6, 40))
    assert gateway.back is not None
    sha = Script("submit").sha.encode()
    gateway.back.behave(Behaviour(Kind.CUT, after_request=sha), Direction.REPLY)
    before = await num_requests(stage)
    cuts = gateway.back.counts[Kind.CUT]
    task = asyncio.create_task(stage.client.ask(spec(6, 40)))
    await same(task, undisturbed)
    assert gateway.back.counts[Kind.CUT] == cuts + 1
    assert await num_requests(stage) == before + 1


async def num_requests(stage: Stage) -> int:
    return len([key async for key in stage.cluster.redis.client.scan_iter(match="*:req:*") if b"selftest" not in key])


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_the_reply_to_a_claim_is_lost(stage: Stage, role: str) -> None:
    """The entry stays pending for a worker that never saw it, which finds it in its own list."""
    number = 7 if role == "prefill" else 8
    undisturbed = await stage.client.ask(spec(number, 40))
    cut = Behaviour(Kind.CUT, after_request=b"XREADGROUP", with_reply=b"$2\r\nid\r\n")
    proxies = [slot.back for slot in stage.cluster.of_role(role) if slot.back]
    before = sum(proxy.counts[Kind.CUT] for proxy in proxies)
    for proxy in proxies:
        proxy.behave(cut, Direction.REPLY)
    task = asyncio.create_task(stage.client.ask(spec(number, 40)))

    async def is_cut() -> bool:
        return sum(proxy.counts[Kind.CUT] for proxy in proxies) > before

    await stage.until(is_cut, "a claim's reply to be cut")
    for proxy in proxies:
        proxy.heal()
    await same(task, undisturbed)


async def test_redis_has_no_memory_for_a_while(stage: Stage) -> None:
    task, undisturbed = await stage.begin(spec(9))
    await stage.cluster.redis.limit_memory(1)
    try:
        (gateway,) = stage.cluster.of_role("gateway")
        body = BODY | {"max_tokens": 4}
        async with stage.cluster.http.post(gateway.url + COMPLETION, json=body) as response:
            assert response.status == 503
            assert "Retry-After" in response.headers
    finally:
        await stage.cluster.redis.limit_memory(0)
    await same(task, undisturbed)


async def test_a_slow_redis_makes_nobody_look_dead(stage: Stage) -> None:
    task, undisturbed = await stage.begin(spec(10))
    before = stage.cluster.respawns
    assert stage.cluster.redis.child is not None
    stage.cluster.redis.child.stop()
    await asyncio.sleep(2 * HEARTBEAT_TTL_S)
    stage.cluster.redis.child.go_on()
    record = await same(task, undisturbed)
    assert max(epochs(record)) == epochs(undisturbed)[0], "the request changed hands"
    assert stage.cluster.respawns == before


async def test_a_wrong_password_stops_a_worker_with_a_sentence(stage: Stage) -> None:
    stage.cluster.supervised = False
    wrong = stage.cluster.redis.url.replace(stage.cluster.redis.password, "wrong")
    slot = await stage.cluster.add("decode", SLIPSTREAM_REDIS__URL=wrong)
    try:
        assert slot.child is not None
        assert await ended(slot.child, WAIT_S) == 1
        assert "Redis refused" in slot.child.log_text()
        assert "SLIPSTREAM_REDIS__URL" in slot.child.log_text()
    finally:
        stage.cluster.slots.remove(slot)
        stage.cluster.supervised = True


async def test_a_password_changed_at_run_time_makes_the_gateway_unready_until_it_is_right_again(stage: Stage) -> None:
    (gateway,) = stage.cluster.of_role("gateway")
    redis = stage.cluster.redis
    undisturbed = await stage.client.ask(spec(11, 40))
    await redis.client.config_set("requirepass", "another")
    await redis.cut_connections()
    try:
        await stage.until(lambda: _not(stage.cluster.is_healthy(gateway)), "the gateway to be unready")
    finally:
        await redis.client.config_set("requirepass", redis.password)
    await stage.cluster.ready()
    await same(asyncio.create_task(stage.client.ask(spec(11, 40))), undisturbed)


async def _not(value: Awaitable[bool]) -> bool:
    return not await value


@pytest.mark.parametrize("kind", [Kind.FLIP, Kind.DROP, Kind.DUPLICATE, Kind.CUT, Kind.HOLE])
async def test_a_broken_kv_link_costs_a_computation_and_no_token(stage: Stage, kind: Kind) -> None:
    number = 20 + list(Kind).index(kind)
    fresh = [3 + (number * i) % 500 for i in range(300)]  # in no prefix cache, so that its bytes have to move
    wanted = Spec(number, COMPLETION, BODY | {"prompt": fresh, "max_tokens": 30}, stream=True)
    proxies = [slot.front for slot in stage.cluster.of_role("prefill") if slot.front]
    for proxy in proxies:
        proxy.behave(Behaviour(kind, at=2000), Direction.REPLY)
    before = sum(proxy.counts[kind] for proxy in proxies)
    disturbed = asyncio.create_task(stage.client.ask(wanted))

    async def has_acted() -> bool:
        return sum(proxy.counts[kind] for proxy in proxies) > before

    await stage.until(has_acted, "the link to break")
    record = await disturbed
    for proxy in proxies:
        proxy.heal()
    await same(asyncio.create_task(stage.client.ask(wanted)), record)


async def test_tokens_delivered_are_tokens_counted_also_after_a_migration(stage: Stage) -> None:
    (gateway,) = stage.cluster.of_role("gateway")
    before = invariants.metric_sums(await stage.cluster.metrics(gateway))["generation_tokens_total"]
    task, undisturbed = await stage.begin(spec(30))
    counted_after_first = before + len(undisturbed.answer[0].tokens)
    victim = await stage.worker_of("decode")
    assert victim.child is not None
    victim.child.kill()
    record = await same(task, undisturbed)
    after = invariants.metric_sums(await stage.cluster.metrics(gateway))["generation_tokens_total"]
    assert after - counted_after_first == len(record.answer[0].tokens)
    assert invariants.metrics_add_up(await stage.cluster.metrics(gateway)) == []
