"""Who may call a peer dead: not a worker whose own heartbeats Redis refuses, and not one that stood still itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.connection import connect
from shared.bus.embedded import EmbeddedServer
from shared.bus.registry import Registry
from shared.bus.sweeper import InFlight, Sweeper
from shared.protocol.keys import Keys
from shared.protocol.messages import End, WorkerBeat
from tests.integration.bus_helpers import Bench


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
async def bench(server: EmbeddedServer, keys: Keys) -> AsyncIterator[Bench]:
    async with connect(server.url) as client:
        yield Bench.of(client, keys)


@dataclass
class Judge:
    """A worker that beats and sweeps as the real one does, with a clock the test moves."""

    bench: Bench
    now: float = 0.0
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.registry = Registry(self.bench.client, self.bench.keys, beat_ttl_ms=3000)
        in_flight = InFlight(lambda: set(), lambda: self.requests)
        queue = self.bench.queue("judge")
        self.sweeper = Sweeper(
            self.bench.client, self.bench.store, queue, self.registry, in_flight, clock=lambda: self.now
        )

    async def tick(self) -> None:
        """One second of its life: a heartbeat, then a round of the sweeper."""
        self.now += 1.0
        try:
            await self.registry.beat(WorkerBeat("judge", "decode", "ready", "m", "n", "l"))
        except ResponseError:
            self.sweeper.disturbed()
        await self.sweeper.tick()


async def fill(client: Redis) -> None:
    """No write that needs memory succeeds any more, as on a server that is full."""
    await client.config_set("maxmemory-policy", "noeviction")
    await client.config_set("maxmemory", "1")


async def test_a_server_out_of_memory_makes_nobody_dead(bench: Bench) -> None:
    lease = await bench.committed()
    judge = Judge(bench)
    for _ in range(3):
        await judge.tick()
    await fill(bench.client)
    for _ in range(20):
        await judge.tick()
        assert await bench.client.ping()
    await bench.client.config_set("maxmemory", "0")
    assert (await bench.store.touch(lease)).owner, "its owner looks dead, but so does everybody"
    await judge.registry.beat(WorkerBeat("d", "decode", "ready", "m", "n", "l"))
    await judge.registry.beat(WorkerBeat("p", "prefill", "ready", "m", "n", "l"))
    for _ in range(6):
        await judge.tick()
    assert (await bench.store.touch(lease)).owner
    assert judge.sweeper.counters.dead_workers == 0


async def test_a_dead_worker_is_found_once_there_is_memory_again(bench: Bench) -> None:
    lease = await bench.committed()
    judge = Judge(bench)
    await fill(bench.client)
    for _ in range(6):
        await judge.tick()
    await bench.client.config_set("maxmemory", "0")
    for _ in range(6):
        await judge.tick()
    assert not (await bench.store.touch(lease)).owner
    assert judge.sweeper.counters.dead_workers == 1


async def test_orphans_are_judged_by_the_gateway_that_holds_them_now(bench: Bench) -> None:
    lease = await bench.committed()
    judge = Judge(bench)
    assert await bench.store.adopt("r", "g2") is not None
    gateway = (await bench.store.touch(lease)).gateway
    assert gateway == "g2"
    judge.requests = [("r", gateway)]
    for _ in range(20):
        await judge.registry.beat_gateway("g2")
        await judge.registry.beat(WorkerBeat("d", "decode", "ready", "m", "n", "l"))
        await judge.tick()
    assert (await bench.store.touch(lease)).owner, "adopted, and its second gateway lives"
    await judge.registry.leave_gateway("g2")
    for _ in range(20):
        await judge.registry.beat(WorkerBeat("d", "decode", "ready", "m", "n", "l"))
        await judge.tick()
    assert (await bench.journal()).end == End("cancelled", "orphaned")


async def test_a_server_that_stands_still_makes_nobody_dead(server: EmbeddedServer, bench: Bench) -> None:
    """The round trip of the judge takes as long as the standstill, so it waits for a whole healthy time first."""
    lease = await bench.committed()
    judge = Judge(bench)
    for _ in range(3):
        await judge.tick()
    judge.now += 1.0
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    ticking = asyncio.create_task(judge.sweeper.tick())
    await asyncio.sleep(0)
    judge.now += 30.0
    os.kill(server.pid, signal.SIGCONT)
    await ticking
    await judge.registry.beat(WorkerBeat("d", "decode", "ready", "m", "n", "l"))
    await judge.registry.beat(WorkerBeat("p", "prefill", "ready", "m", "n", "l"))
    for _ in range(5):
        await judge.tick()
    assert (await bench.store.touch(lease)).owner


async def test_a_judge_disturbed_in_the_middle_of_its_round_judges_nobody(bench: Bench) -> None:
    """Its heartbeat fails while it waits for Redis: the round ends without a verdict and without an error."""
    lease = await bench.committed()
    judge = Judge(bench)
    for _ in range(8):
        await judge.tick()
        if not (await bench.store.touch(lease)).owner:
            break
        judge.sweeper._own_checked = -1e9  # so that each round looks at its own entries first
        genuine = judge.sweeper._sweep_own

        async def disturbed() -> None:
            judge.sweeper.disturbed()

        judge.sweeper._sweep_own = disturbed  # type: ignore[method-assign]
        await judge.tick()
        judge.sweeper._sweep_own = genuine  # type: ignore[method-assign]
    assert (await bench.store.touch(lease)).owner
    assert judge.sweeper.counters.dead_workers == 0
