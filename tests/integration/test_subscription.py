"""The token channel read off the socket: whole messages however they come, and a lost connection is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvloop
from redis.asyncio import Redis

from shared.bus import subscription as subscription_module
from shared.bus.connection import connect, connect_blocking
from shared.bus.subscription import Subscription

TIMEOUT_S = 10.0


@asynccontextmanager
async def subscribed(url: str, channel: str) -> AsyncIterator[tuple[Subscription, Redis]]:
    """A subscription, and a client to publish with."""
    async with connect(url) as commands, connect_blocking(url) as blocking:
        subscription = await Subscription.open(blocking, channel)
        try:
            yield subscription, commands
        finally:
            await subscription.close()


async def received(subscription: Subscription, count: int) -> list[bytes]:
    """The next `count` messages."""
    found: list[bytes] = []
    async with asyncio.timeout(TIMEOUT_S):
        while len(found) < count:
            found += await subscription.messages()
    return found


async def exchange(url: str, channel: str) -> None:
    """Messages of all sizes come whole and in order; empty ones and what looks like protocol are messages too."""
    sent = [b"a", b"", b"+OK\r\n$5\r\n", b"x" * 3_000_000, *(str(number).encode() for number in range(500))]
    async with subscribed(url, channel) as (subscription, commands):
        async with commands.pipeline(transaction=False) as pipe:
            for message in sent:
                pipe.publish(channel, message)
            assert set(await pipe.execute()) == {1}
        assert await received(subscription, len(sent)) == sent
        assert await commands.publish(f"{channel}-other", b"for somebody else") == 0
    async with connect(url) as commands:
        assert await commands.publish(channel, b"nobody listens any more") == 0


async def test_messages_come_whole_and_in_order(redis_url: str, deployment: str) -> None:
    await exchange(redis_url, deployment)


def test_so_they_do_on_the_loop_that_the_gateway_runs_on(redis_url: str, deployment: str) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(exchange(redis_url, deployment))


async def test_a_cut_connection_is_told_after_what_came_before(redis_url: str, deployment: str) -> None:
    async with subscribed(redis_url, deployment) as (subscription, commands):
        await commands.publish(deployment, b"last")
        await commands.client_kill_filter(_type="pubsub")
        assert await received(subscription, 1) == [b"last"]
        with pytest.raises(OSError, match="closed the connection"):
            await received(subscription, 1)


async def test_an_idle_connection_is_spoken_to(
    redis_url: str, deployment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription_module, "PING_S", 0.01)
    async with subscribed(redis_url, deployment) as (subscription, commands):
        async with asyncio.timeout(TIMEOUT_S):
            while not await pinging(commands):
                await asyncio.sleep(0.01)
        await commands.publish(deployment, b"still there")
        assert await received(subscription, 1) == [b"still there"], "answers to pings are no messages"


async def pinging(commands: Redis) -> bool:
    """Whether a subscribed connection's last command was a ping."""
    return any(one["sub"] == "1" and one["cmd"] == "ping" for one in await commands.client_list())
