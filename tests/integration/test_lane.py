"""The connection of its own for appends: what happens to it happens to no append."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from shared.bus.connection import connect
from shared.bus.embedded import EmbeddedServer
from shared.bus.lane import open_lane
from shared.bus.results import Appended
from shared.protocol.keys import Keys
from tests.integration.bus_helpers import Bench, tokens

LANE_TIMEOUT_S = 0.2


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    """One of its own: these tests stop it, and cut its connections."""
    with EmbeddedServer() as own:
        yield own


@asynccontextmanager
async def bench_of(server: EmbeddedServer, timeout_s: float = 5.0) -> AsyncIterator[Bench]:
    async with connect(server.url) as client, open_lane(server.url, timeout_s) as lane:
        yield Bench.of(client, Keys("lanes"), lane=lane)


async def ids_of_clients(client: Redis, command: str) -> list[str]:
    return [entry["id"] for entry in await client.client_list() if entry["cmd"] == command]


async def test_appends_go_by_a_connection_of_their_own(server: EmbeddedServer) -> None:
    async with bench_of(server) as bench:
        lease = await bench.committed()
        held = [1]
        for token in range(20):
            assert await bench.append(lease, tokens(held, [token])) == [Appended()]
            held.append(token)
        await bench.client.ping()
        assert len(await ids_of_clients(bench.client, "evalsha")) == 1
        assert (await bench.journal()).choices[0].tokens == held


async def test_a_lane_that_was_cut_loses_no_append_and_is_there_again(server: EmbeddedServer) -> None:
    async with bench_of(server) as bench:
        lease = await bench.committed()
        await bench.append(lease, tokens([1], [2]))
        await bench.client.ping()
        before = await ids_of_clients(bench.client, "evalsha")
        for client_id in before:
            await bench.client.client_kill_filter(_id=client_id)
        assert await bench.append(lease, tokens([1, 2], [3])) == [Appended()]
        assert await bench.append(lease, tokens([1, 2, 3], [4])) == [Appended()]
        await bench.client.ping()
        after = await ids_of_clients(bench.client, "evalsha")
        assert len(after) == 1
        assert after != before
        assert (await bench.journal()).choices[0].tokens == [1, 2, 3, 4]


async def test_a_lane_finds_the_scripts_gone(server: EmbeddedServer) -> None:
    async with bench_of(server) as bench:
        lease = await bench.committed()
        await bench.append(lease, tokens([1], [2]))
        await bench.client.script_flush()
        assert await bench.append(lease, tokens([1, 2], [3])) == [Appended()]


async def test_a_reply_that_came_too_late_is_not_taken_for_the_next_one(server: EmbeddedServer) -> None:
    async with bench_of(server, LANE_TIMEOUT_S) as bench:
        lease, other = await bench.committed(), await bench.committed(bench.job("r2", n=2))
        await bench.append(lease, tokens([1], [2]))
        server.pause()
        try:
            with pytest.raises(TimeoutError):
                await bench.append(lease, tokens([1, 2], [3]))
        finally:
            server.resume()
        assert await bench.append(other, tokens([1], [2]), tokens([1], [2], 1)) == [Appended(), Appended()]
        assert await bench.append(lease, tokens([1, 2], [3])) == [Appended()], "a repeat, or the first: the same"


async def test_a_call_that_was_given_up_leaves_no_reply_behind(server: EmbeddedServer) -> None:
    async with bench_of(server) as bench:
        lease, other = await bench.committed(), await bench.committed(bench.job("r2", n=2))
        await bench.append(lease, tokens([1], [2]))
        server.pause()
        try:
            call = asyncio.create_task(bench.append(lease, tokens([1, 2], [3])))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        finally:
            server.resume()
        assert await bench.append(other, tokens([1], [2]), tokens([1], [2], 1)) == [Appended(), Appended()]


async def test_calls_made_at_once_take_turns(server: EmbeddedServer) -> None:
    async with bench_of(server) as bench:
        leases = [await bench.committed(bench.job(f"r{i}")) for i in range(8)]
        answers = await asyncio.gather(*(bench.append(lease, tokens([1], [2])) for lease in leases))
        assert answers == [[Appended()]] * 8
