"""Work queues, heartbeats and the sweeper on the real server."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import pytest
from redis.asyncio import Redis

from shared.bus.registry import Registry
from shared.bus.results import Begun
from shared.bus.sweeper import ORPHAN_GRACE_S, InFlight, Sweeper
from shared.bus.workqueue import WorkQueue
from shared.protocol.keys import Keys
from shared.protocol.messages import End, WorkerBeat
from tests.integration.bus_helpers import Bench, tokens


@pytest.fixture
def bench(redis_client: Redis, keys: Keys) -> Bench:
    return Bench.of(redis_client, keys)


def beat(worker_id: str, role: str = "decode") -> WorkerBeat:
    return WorkerBeat(worker_id, role, "ready", "m", "n" * 16, "l" * 16, addresses=(("tcp", "127.0.0.1:1"),))


# ---- work queue -------------------------------------------------------------------------------------


async def test_work_queued_before_any_worker_is_read(bench: Bench, blocking_client: Redis) -> None:
    await bench.store.submit(bench.job())
    queue = WorkQueue(blocking_client, bench.client, [bench.prefill, bench.decode], "w")
    items = await queue.read(10, 50)
    assert [(stream, fields) for stream, _, fields in items] == [(bench.prefill, {"id": "r", "deaths": "0"})]
    assert await queue.read(10, 1) == []
    assert await queue.pending_own() == [(bench.prefill, items[0][1], "r")]


async def test_each_entry_goes_to_one_consumer(bench: Bench) -> None:
    for i in range(6):
        await bench.store.submit(bench.job(f"r{i}"))
    first = await bench.queue("w1", bench.prefill).read(4, 0)
    second = await bench.queue("w2", bench.prefill).read(4, 0)
    assert [fields["id"] for _, _, fields in first + second] == [f"r{i}" for i in range(6)]


async def test_a_blocked_read_wakes_with_new_work(bench: Bench, blocking_client: Redis) -> None:
    queue = WorkQueue(blocking_client, bench.client, [bench.prefill], "w")
    reading = asyncio.create_task(queue.read(1, 2000))
    await bench.store.submit(bench.job())
    assert (await asyncio.wait_for(reading, 5))[0][2] == {"id": "r", "deaths": "0"}


async def test_groups_lost_with_redis_are_made_again(bench: Bench) -> None:
    queue = bench.queue("w", bench.prefill)
    await queue.read(1, 0)
    await bench.client.delete(bench.prefill)
    await bench.store.submit(bench.job())
    assert await queue.pending_own() == []
    assert await queue.read(1, 0) == []
    assert len(await queue.read(1, 0)) == 1


async def test_a_read_can_be_narrowed(bench: Bench) -> None:
    await bench.store.submit(bench.job())
    queue = bench.queue("w")
    assert await queue.read(1, 0, [bench.decode]) == []
    assert len(await queue.read(1, 0, [bench.prefill])) == 1


async def test_an_entry_whose_payload_is_gone_has_no_request(bench: Bench) -> None:
    await bench.store.submit(bench.job())
    stream, entry = await bench.read(bench.prefill, "w")
    await bench.client.xdel(stream, entry)
    assert await bench.queue("w", stream).pending_own() == [(stream, entry, None)]


# ---- registry ---------------------------------------------------------------------------------------


async def test_beats_are_listed_until_they_expire(redis_client: Redis, keys: Keys) -> None:
    registry = Registry(redis_client, keys, beat_ttl_ms=60)
    await registry.beat(beat("w2"))
    await registry.beat(beat("w1", "prefill"))
    assert {worker.worker_id for worker in await registry.live()} <= {"w1", "w2"}
    lasting = Registry(redis_client, keys)
    await lasting.beat(beat("w2"))
    deadline = time.monotonic() + 5
    while [worker.worker_id for worker in await registry.live()] != ["w2"]:
        assert time.monotonic() < deadline
    assert await redis_client.smembers(keys.workers) == {b"w2"}
    assert await registry.live() == [beat("w2")]
    assert await registry.dead_workers(["w1", "w2"]) == {"w1"}


async def test_leaving_is_at_once(redis_client: Redis, keys: Keys) -> None:
    registry = Registry(redis_client, keys)
    await registry.beat(beat("w1"))
    await registry.leave("w1")
    await registry.beat_gateway("g1")
    await registry.beat_gateway("g2")
    await registry.leave_gateway("g2")
    assert await registry.live() == []
    assert await registry.dead_gateways(["g1", "g2", "g3"]) == {"g2", "g3"}
    assert await registry.dead_gateways([]) == set()


async def test_gateways_that_share_the_workers_are_counted(redis_client: Redis, keys: Keys) -> None:
    registry = Registry(redis_client, keys, beat_ttl_ms=60)
    assert await registry.live_gateways() == set()
    await registry.beat_gateway("gone")
    await Registry(redis_client, keys).beat_gateway("g1")
    deadline = time.monotonic() + 5
    while await registry.live_gateways() != {"g1"}:
        assert time.monotonic() < deadline
    assert await redis_client.smembers(keys.gateways) == {b"g1"}
    await registry.leave_gateway("g1")
    assert await registry.live_gateways() == set()
    assert not await redis_client.exists(keys.gateways)


async def test_a_beat_that_cannot_be_read_is_left_out(redis_client: Redis, keys: Keys) -> None:
    registry = Registry(redis_client, keys)
    await registry.beat(beat("w1"))
    await redis_client.sadd(keys.workers, "w2")
    await redis_client.set(keys.worker("w2"), b"\x00nonsense")
    assert await registry.live() == [beat("w1")]


# ---- sweeper ----------------------------------------------------------------------------------------


@dataclass
class Peer:
    """A worker beside the dead one, with a clock the test moves."""

    bench: Bench
    now: float = 0.0
    entries: set[tuple[str, str]] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    streams: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.registry = Registry(self.bench.client, self.bench.keys)
        self.sweeper = Sweeper(
            self.bench.client,
            self.bench.store,
            self.bench.queue("peer", *self.streams),
            self.registry,
            InFlight(lambda: self.entries, lambda: self.requests),
            clock=lambda: self.now,
            watched=self.watched,
        )

    async def tick(self, after: float = 1.0) -> None:
        self.now += after
        await self.sweeper.tick()


@pytest.fixture
def peer(bench: Bench) -> Peer:
    return Peer(bench)


async def test_a_dead_workers_request_is_requeued_after_two_misses_of_a_healthy_peer(bench: Bench, peer: Peer) -> None:
    lease = await bench.committed()
    await peer.tick(0)
    await peer.tick(1)
    await peer.tick(1)
    assert (await bench.store.touch(lease)).owner, "not healthy for a whole TTL yet"
    await peer.tick(1)
    assert (await bench.store.touch(lease)).owner, "one miss only"
    await peer.tick(1)
    assert await bench.field("state") == "queued"
    assert await bench.field("deaths") == "1"
    assert peer.sweeper.counters.dead_workers == 1
    names = [row["name"] for row in await bench.client.xinfo_consumers(bench.decode, "workers")]
    assert names == [], "the dead consumer is forgotten once it holds nothing"


async def test_the_other_roles_streams_can_be_watched(bench: Bench) -> None:
    """The last decode worker dies: a prefill worker brings its request back."""
    peer = Peer(bench, streams=(bench.prefill,), watched=(bench.decode,))
    lease = await bench.committed()
    for _ in range(5):
        await peer.tick()
    assert not (await bench.store.touch(lease)).owner
    assert await bench.field("state") == "queued"


async def test_a_worker_with_a_heartbeat_keeps_its_work(bench: Bench, peer: Peer) -> None:
    lease = await bench.committed()
    await peer.registry.beat(beat("d"))
    for _ in range(8):
        await peer.tick()
    assert (await bench.store.touch(lease)).owner


async def test_a_disturbed_peer_judges_nobody_for_a_while(bench: Bench, peer: Peer) -> None:
    lease = await bench.committed()
    for _ in range(12):
        await peer.tick()
        peer.sweeper.disturbed()
    assert (await bench.store.touch(lease)).owner


async def test_own_entries_not_in_flight_come_back_without_a_death(bench: Bench, peer: Peer) -> None:
    await bench.store.submit(bench.job("lost"))
    await bench.store.submit(bench.job("busy"))
    items = await bench.queue("peer", bench.prefill).read(2, 0)
    for stream, entry, fields in items:
        begun = await bench.store.begin(stream, entry, fields["id"], "peer")
        assert isinstance(begun, Begun)
    peer.entries = {(items[1][0], items[1][1])}
    await peer.tick()
    assert await bench.field("state", "lost") == "prefill", "it may just have been read"
    await peer.tick()
    assert await bench.field("state", "lost") == "queued"
    assert await bench.field("deaths", "lost") == "0"
    assert await bench.field("state", "busy") == "prefill"


async def test_an_entry_without_payload_is_let_go(bench: Bench, peer: Peer) -> None:
    await bench.store.submit(bench.job())
    stream, entry = await bench.read(bench.prefill, "peer")
    await bench.client.xdel(stream, entry)
    await peer.tick()
    await peer.tick()
    assert await bench.num_pending() == 0


async def test_orphans_end_after_the_grace_unless_adopted(bench: Bench, peer: Peer) -> None:
    lost, adopted = await bench.committed(bench.job("lost")), await bench.committed(bench.job("adopted"))
    await peer.registry.beat(beat("d"))
    await peer.registry.beat(beat("p", "prefill"))
    await bench.store.adopt("adopted", "g2")
    peer.requests = [("lost", "g"), ("adopted", "g")]
    for _ in range(5):
        await peer.tick()
    assert (await bench.store.touch(lost)).owner
    await peer.tick(ORPHAN_GRACE_S)
    assert (await bench.journal("lost")).end == End("cancelled", "orphaned")
    assert (await bench.store.touch(adopted)).owner
    assert await bench.append(adopted, tokens([1], [2]))


async def test_a_live_gateway_keeps_its_requests(bench: Bench, peer: Peer) -> None:
    lease = await bench.committed()
    await peer.registry.beat(beat("d"))
    await peer.registry.beat(beat("p", "prefill"))
    await peer.registry.beat_gateway("g")
    peer.requests = [("r", "g")]
    for _ in range(5):
        await peer.tick(ORPHAN_GRACE_S)
    assert (await bench.store.touch(lease)).owner


async def test_running_survives_a_redis_that_is_away(bench: Bench, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    async def failing() -> None:
        calls.append(1)
        raise ConnectionError("away")

    monkeypatch.setattr(peer.sweeper, "tick", failing)
    monkeypatch.setattr("shared.bus.sweeper.INTERVAL_S", 0)
    running = asyncio.create_task(peer.sweeper.run())
    deadline = time.monotonic() + 5
    while len(calls) < 3:
        assert time.monotonic() < deadline
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
