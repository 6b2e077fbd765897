"""Several readers of one request, at one gateway and at several: who holds it, who cancels it, who follows."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from shared.bus.handle import StreamReader
from shared.bus.stream import NOBODY, RequestStreams
from shared.errors import BusUnavailable
from shared.protocol.keys import Keys
from shared.protocol.messages import End, Tokens
from shared.protocol.position import START, Position, Standing
from tests.integration.bus_helpers import tokens
from tests.integration.test_request_streams import WAIT_S, Gateway, collect, first, gateway


def quick(url: str, keys: Keys, name: str = "g") -> AbstractAsyncContextManager[Gateway]:
    return gateway(url, keys, name, silence_s=0.1, resume_grace_s=0.3)


async def attached(g: Gateway, request_id: str = "r", **options: Any) -> StreamReader:
    reader = await g.streams.attach(request_id, **options)
    assert reader is not None
    return reader


async def holder_is(g: Gateway, name: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while await g.bench.field("gw") != name:
            await asyncio.sleep(0.01)


async def beat(g: Gateway, *names: str) -> None:
    """Gateways that are alive, for longer than any test."""
    for name in names:
        await g.bench.client.set(g.bench.keys.gateway(name), b"1", px=60_000)


async def test_every_reader_gets_every_event_at_its_own_pace(redis_url: str, keys: Keys) -> None:
    async with quick(redis_url, keys) as g:
        reader = await g.open()
        lease = await g.begun()
        await g.bench.append(lease, tokens([], [1]))
        assert isinstance(await first(reader), Tokens)
        second = await attached(g)
        await g.bench.append(lease, tokens([1], [2], finish="stop"))
        assert await collect(second) == ([1, 2], End("finished"))
        late = await attached(g)
        assert await collect(late) == ([1, 2], End("finished"))
        rest = [event async for event in reader]
        assert [event.tokens for event in rest if isinstance(event, Tokens)] == [(2,)]
        assert (str(second.position), second.end) == ("2-3", End("finished"))
        assert len(g.streams) == 0


async def test_a_reader_of_several_that_leaves_cancels_nothing_and_the_last_one_does(
    redis_url: str, keys: Keys
) -> None:
    async with quick(redis_url, keys) as g:
        reader = await g.open()
        other = await attached(g)
        lease = await g.begun()
        reader.leave("client_gone")
        await g.bench.append(lease, tokens([], [1]))
        assert isinstance(await first(other), Tokens)
        other.leave("client_gone")
        await g.until(lambda: len(g.streams) == 0)
        assert not (await g.bench.store.touch(lease)).owner


async def test_a_detachable_request_waits_for_a_reader_to_come_back(redis_url: str, keys: Keys) -> None:
    async with gateway(redis_url, keys, silence_s=0.1, resume_grace_s=1000) as g:
        reader = await g.streams.open(g.bench.job(), detachable=True)
        lease = await g.begun()
        reader.leave("client_gone")
        await g.bench.append(lease, tokens([], [1]))
        back = await attached(g)
        await g.bench.append(lease, tokens([1], [2], finish="stop"))
        assert await collect(back) == ([1, 2], End("finished"))
        assert not back.was_abandoned


async def test_a_detachable_request_is_cancelled_when_nobody_comes(redis_url: str, keys: Keys) -> None:
    async with quick(redis_url, keys) as g:
        reader = await g.streams.open(g.bench.job(), detachable=True)
        reader.leave("client_gone")
        await g.until(lambda: len(g.streams) == 0)
        late = await attached(g)
        assert await collect(late) == ([], End("cancelled", "client_gone"))
        assert late.was_abandoned


async def test_another_gateway_takes_over_from_the_first_token(redis_url: str, keys: Keys) -> None:
    async with quick(redis_url, keys) as g, quick(redis_url, keys, "g2") as other:
        await beat(g, "g", "g2")
        reader = await g.open()
        lease = await g.begun()
        await g.bench.append(lease, tokens([], [1]))
        adopted = await attached(other)
        assert await other.streams.attach("unknown") is None
        await holder_is(g, "g2")
        await g.bench.append(lease, tokens([1], [2]))
        await g.bench.append(lease, tokens([1, 2], [3], finish="stop"))
        assert await collect(adopted) == ([1, 2, 3], End("finished"))
        assert await collect(reader) == ([1, 2, 3], End("finished")), "the first one follows"


async def test_a_follower_takes_the_request_back_when_its_holder_is_gone(redis_url: str, keys: Keys) -> None:
    async with quick(redis_url, keys) as g:
        reader = await g.open()
        lease = await g.begun()
        await beat(g, "g", "dead")
        await g.bench.store.adopt("r", "dead")
        handle = g.streams._handles["r"]
        await g.until(lambda: handle.is_follower)
        await g.bench.append(lease, tokens([], [1]))
        assert isinstance(await first(reader), Tokens)
        assert await g.bench.field("gw") == "dead", "it only reads along"
        await g.bench.client.delete(keys.gateway("dead"))
        await holder_is(g, "g")
        await g.bench.append(lease, tokens([1], [2], finish="stop"))
        rest = [event async for event in reader]
        assert rest[-1] == End("finished")


async def test_a_follower_does_not_keep_the_request_alive(redis_url: str, keys: Keys) -> None:
    async with quick(redis_url, keys) as g:
        await g.open()
        await beat(g, "g", "other")
        await g.bench.store.adopt("r", "other")
        handle = g.streams._handles["r"]
        await g.until(lambda: handle.is_follower)
        await g.bench.client.pexpire(keys.request("r"), 20_000)
        heard = handle.heard
        await g.until(lambda: handle.heard > heard)
        assert await g.bench.client.pttl(keys.request("r")) <= 20_000


async def test_a_follower_without_readers_is_forgotten_and_cancels_nothing(redis_url: str, keys: Keys) -> None:
    async with quick(redis_url, keys) as g:
        reader = await g.open()
        lease = await g.begun()
        await beat(g, "g", "other")
        await g.bench.store.adopt("r", "other")
        await g.until(lambda: g.streams._handles["r"].is_follower)
        reader.leave("client_gone")
        await g.until(lambda: len(g.streams) == 0)
        assert (await g.bench.store.touch(lease)).owner


async def test_what_others_may_follow_is_left_to_nobody_instead_of_cancelled(redis_url: str, keys: Keys) -> None:
    async with quick(redis_url, keys) as g, quick(redis_url, keys, "g2") as other:
        await beat(g, "g", "g2")
        reader = await g.open()
        lease = await g.begun()
        adopted = await attached(other)
        adopted.leave("client_gone")
        await g.until(lambda: len(other.streams) == 0)
        await holder_is(g, "g")
        await g.bench.append(lease, tokens([], [1], finish="stop"))
        assert await collect(reader) == ([1], End("finished"))


async def test_a_release_gives_away_only_what_is_held(redis_url: str, keys: Keys) -> None:
    async with quick(redis_url, keys) as g:
        await g.open()
        await g.bench.store.adopt("r", NOBODY, held_by="other")
        assert await g.bench.field("gw") == "g"
        await g.bench.store.adopt("r", NOBODY, held_by="g")
        assert await g.bench.field("gw") == NOBODY


async def test_a_finished_request_is_read_without_changing_anything(redis_url: str, keys: Keys) -> None:
    async with quick(redis_url, keys) as g, quick(redis_url, keys, "g2") as other:
        reader = await g.open()
        lease = await g.begun()
        await g.bench.append(lease, tokens([], [1], finish="stop"))
        assert await collect(reader) == ([1], End("finished"))
        client = g.bench.client
        await client.pexpire(keys.request("r"), 20_000)
        await client.pexpire(keys.log("r"), 20_000)
        before = await client.hgetall(keys.request("r"))
        assert await collect(await attached(other)) == ([1], End("finished"))
        assert await client.hgetall(keys.request("r")) == before
        for key in (keys.request("r"), keys.log("r")):
            assert 0 < await client.pttl(key) <= 20_000
        await client.delete(keys.request("r"), keys.log("r"))
        assert await other.streams.attach("r") is None
        assert await client.exists(keys.request("r"), keys.log("r")) == 0, "nothing is brought back"
        assert len(other.streams) == 0


async def test_what_is_left_of_the_time_goes_with_the_request(redis_url: str, keys: Keys) -> None:
    async with quick(redis_url, keys) as g, quick(redis_url, keys, "g2") as other:
        await g.open(budget_ms=50_000)
        await g.bench.client.hincrby(keys.request("r"), "deadline", -20_000)
        reader = await attached(other)
        assert 0 < reader.job.budget_ms <= 30_000
        assert reader.job.gateway == "g2"


async def test_letting_go_ends_the_streams_and_not_the_requests(redis_url: str, keys: Keys) -> None:
    async with quick(redis_url, keys) as g, quick(redis_url, keys, "g2") as other:
        reader = await g.open()
        lease = await g.begun()
        gone = await g.open(request_id="gone")
        gone.leave("client_gone")
        assert g.streams.let_go() == 1
        _, end = await collect(reader)
        assert (end.outcome, end.code) == ("error", "draining")
        reader.leave("client_gone")
        await g.until(lambda: len(g.streams) == 0)
        assert (await g.bench.store.touch(lease)).owner, "it was not cancelled, unlike the other"
        adopted = await attached(other)
        await g.bench.append(lease, tokens([], [1], finish="stop"))
        assert await collect(adopted) == ([1], End("finished"))


async def test_where_a_position_stands(redis_url: str, keys: Keys) -> None:
    async with gateway(redis_url, keys, silence_s=1000) as g:
        reader = await g.open()
        lease = await g.begun()
        await g.bench.append(lease, tokens([], [1]))
        assert isinstance(await first(reader), Tokens)
        places = {START: Standing.KNOWN, Position(2, 1): Standing.KNOWN, Position(2, 2): Standing.AHEAD}
        for position, expected in places.items():
            assert await g.streams.standing("r", 1, position) is expected
        assert await g.streams.standing("unknown", 1, START) is None
        await g.bench.client.delete(keys.request("r"), keys.log("r"))
        assert await g.streams.standing("r", 1, Position(2, 1)) is Standing.KNOWN, "it is here, if not in Redis"
        assert await g.streams.standing("r", 1, Position(1, 1)) is Standing.LOST
        assert await attached(g) is not reader


async def test_without_redis_nothing_is_joined(redis_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(redis_url, keys) as g:

        async def unreachable(*_: Any, **__: Any) -> None:
            raise OSError("no route")

        monkeypatch.setattr(g.bench.store, "adopt", unreachable)
        monkeypatch.setattr(g.bench.store, "poll", unreachable)
        with pytest.raises(BusUnavailable):
            await g.streams.attach("r")
        with pytest.raises(BusUnavailable):
            await g.streams.standing("r", 1, START)
        assert isinstance(g.streams, RequestStreams)
        assert len(g.streams) == 0
