"""Orders to drain: who is meant, how the process hears of it, and what the command waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import StringIO

import pytest
from redis.asyncio import Redis
from rich.console import Console

from services.cli.drain import Drain, NotDrained, Selection
from shared.bus.draining import DrainOrders
from shared.bus.registry import Registry
from shared.errors import ConfigurationError
from shared.protocol.keys import Keys
from shared.protocol.messages import WorkerBeat
from shared.tasks import end_tasks

WAIT_S = 15.0


class Site:
    """Processes that beat, heed orders and are replaced, as far as `drain` can tell."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        self.registry = Registry(client, keys, beat_ttl_ms=60_000)
        self.orders = DrainOrders(client, keys)
        self.out = StringIO()
        self.left: list[str] = []
        self.most_missing = 0
        self._running: dict[str, asyncio.Task[None]] = {}
        self._client, self._keys = client, keys

    def drain(self, timeout_s: float = WAIT_S) -> Drain:
        return Drain(self.registry, self.orders, timeout_s, Console(file=self.out, width=200))

    async def start(self, name: str, role: str, *, replaced: bool = False, deaf: bool = False) -> None:
        if role == "gateway":
            await self.registry.beat_gateway(name)
        else:
            await self.registry.beat(WorkerBeat(name, role, "ready", "m", "n", "l"))
        if not deaf:
            self._running[name] = asyncio.create_task(self._live(name, role, replaced=replaced))

    async def _live(self, name: str, role: str, *, replaced: bool) -> None:
        stop = asyncio.Event()
        await self.orders.follow(name, stop, 0.01)
        assert stop.is_set()
        self.left.append(name)
        await (self.registry.leave_gateway(name) if role == "gateway" else self.registry.leave(name))
        self.most_missing = max(self.most_missing, len(self.left) - len(self._started()))
        if replaced:
            await self.start(f"{name}-again", role)

    def _started(self) -> list[str]:
        return [name for name in self._running if name.endswith("-again")]

    async def close(self) -> None:
        await end_tasks(self._running.values())


@asynccontextmanager
async def a_site(client: Redis, keys: Keys, *, replaced: bool = False) -> AsyncIterator[Site]:
    site = Site(client, keys)
    for name, role in (("p1", "prefill"), ("d1", "decode"), ("d2", "decode"), ("g1", "gateway")):
        await site.start(name, role, replaced=replaced)
    try:
        async with asyncio.timeout(WAIT_S):
            yield site
    finally:
        await site.close()


async def test_named_processes_leave(redis_client: Redis, keys: Keys) -> None:
    async with a_site(redis_client, keys) as site:
        await site.drain().run(Selection(ids=("d2", "g1")), rolling=False)
        assert sorted(site.left) == ["d2", "g1"]
        assert "d2 has left." in site.out.getvalue()
        assert [beat.worker_id for beat in await site.registry.live()] == ["d1", "p1"]
        assert not await redis_client.exists(keys.drain("d2")), "an order that was followed is gone"


@pytest.mark.parametrize(
    ("selection", "leave"),
    [
        (Selection(role="decode"), ["d1", "d2"]),
        (Selection(role="gateway"), ["g1"]),
        (Selection(everything=True), ["d1", "d2", "g1", "p1"]),
    ],
)
async def test_a_role_or_all_leave(redis_client: Redis, keys: Keys, selection: Selection, leave: list[str]) -> None:
    async with a_site(redis_client, keys) as site:
        await site.drain().run(selection, rolling=False)
        assert sorted(site.left) == leave


async def test_rolling_takes_the_next_only_when_the_last_was_replaced(redis_client: Redis, keys: Keys) -> None:
    async with a_site(redis_client, keys, replaced=True) as site:
        await site.drain().run(Selection(everything=True), rolling=True)
        assert site.left == ["d1", "d2", "p1", "g1"]
        assert site.most_missing == 1
        assert len(await site.registry.live()) == 3
        assert await site.registry.live_gateways() == {"g1-again"}


async def test_rolling_stops_when_nobody_comes(redis_client: Redis, keys: Keys) -> None:
    async with a_site(redis_client, keys) as site:
        with pytest.raises(NotDrained, match="nothing took its place"):
            await site.drain(0.5).run(Selection(role="decode"), rolling=True)
        assert site.left == ["d1"]


async def test_one_that_does_not_leave_is_named(redis_client: Redis, keys: Keys) -> None:
    async with a_site(redis_client, keys) as site:
        await site.start("deaf", "decode", deaf=True)
        with pytest.raises(NotDrained, match="deaf did not leave"):
            await site.drain(0.3).run(Selection(ids=("deaf", "d1")), rolling=False)
        assert site.left == ["d1"]
        assert 0 < await redis_client.pttl(keys.drain("deaf")) <= 60_000


async def test_nothing_to_drain_is_fine(redis_client: Redis, keys: Keys) -> None:
    site = Site(redis_client, keys)
    await site.drain().run(Selection(everything=True), rolling=False)
    assert "Nothing is alive" in site.out.getvalue()


def test_exactly_one_way_of_choosing() -> None:
    Selection(ids=("a",)).check()
    for wrong in (Selection(), Selection(("a",), "decode"), Selection(role="decode", everything=True)):
        with pytest.raises(ConfigurationError, match="exactly one"):
            wrong.check()
    with pytest.raises(ConfigurationError, match="prefill, decode, gateway"):
        Selection(role="router").check()
    with pytest.raises(ConfigurationError, match="x is not alive"):
        Selection(ids=("x",)).of({"a": "decode"})


async def test_an_order_is_heard_after_redis_was_away(
    redis_client: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, stop, failures = DrainOrders(redis_client, keys), asyncio.Event(), [ConnectionError("away")] * 3
    heard = orders.heard

    async def flaky(process_id: str) -> bool:
        if failures:
            raise failures.pop()
        return await heard(process_id)

    monkeypatch.setattr(orders, "heard", flaky)
    await orders.give("w")
    async with asyncio.timeout(WAIT_S):
        await orders.follow("w", stop, 0.001)
    assert stop.is_set()
    assert not failures
    assert not await redis_client.exists(keys.drain("w"))
