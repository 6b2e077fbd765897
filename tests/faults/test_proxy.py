"""The proxy does what it is told, in the direction it is told, and counts it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.ports import free_port
from tests.faults.proxy import Behaviour, Direction, Kind, Proxy

DEADLINE_S = 10.0
PAYLOAD = bytes(range(256)) * 8


@pytest_asyncio.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """Before a server that answers with what it was sent."""
    port, tasks = free_port(), set[asyncio.Task[None]]()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", port)
    async with server, Proxy(port) as made:
        yield made
        made.reset_connections()
        await asyncio.wait(tasks, timeout=DEADLINE_S) if tasks else None


async def ask(proxy: Proxy, payload: bytes = PAYLOAD) -> bytes:
    """What comes back for a payload on a connection of its own, until it is complete or cut."""
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        received = b""
        try:
            writer.write(payload)
            while len(received) < len(payload) and (data := await reader.read(65536)):
                received += data
        except OSError:
            pass
        finally:
            writer.transport.abort()
    return received


async def test_it_passes_what_it_gets(proxy: Proxy) -> None:
    assert await ask(proxy) == PAYLOAD
    assert proxy.counts["connections"] == 1
    assert proxy.counts["request_bytes"] == proxy.counts["reply_bytes"] == len(PAYLOAD)


@pytest.mark.parametrize("behaviour", [Behaviour(Kind.DELAY, seconds=0.01), Behaviour(Kind.THROTTLE, rate=100_000)])
async def test_slow_links_lose_nothing(proxy: Proxy, behaviour: Behaviour) -> None:
    proxy.behave(behaviour)
    assert await ask(proxy) == PAYLOAD


async def test_one_byte_is_flipped_and_then_no_more(proxy: Proxy) -> None:
    proxy.behave(Behaviour(Kind.FLIP, at=300), Direction.REPLY)
    received = await ask(proxy)
    assert [index for index, pair in enumerate(zip(received, PAYLOAD, strict=True)) if pair[0] != pair[1]] == [300]
    assert await ask(proxy) == PAYLOAD
    assert proxy.counts[Kind.FLIP] == 1


async def test_a_cut_comes_after_so_many_bytes(proxy: Proxy) -> None:
    proxy.behave(Behaviour(Kind.CUT, at=100), Direction.REPLY)
    assert await ask(proxy) == PAYLOAD[:100]
    assert await ask(proxy) == PAYLOAD


async def test_a_reply_is_cut_only_after_its_request(proxy: Proxy) -> None:
    proxy.behave(Behaviour(Kind.CUT, after_request=b"XADD", with_reply=b"1-1"), Direction.REPLY)
    assert await ask(proxy, b"GET 1-1") == b"GET 1-1"
    assert await ask(proxy, b"XADD none") == b"XADD none"
    assert await ask(proxy, b"XADD 1-1") == b""
    assert await ask(proxy, b"XADD 1-1") == b"XADD 1-1"
    assert proxy.counts[Kind.CUT] == 1


async def test_a_piece_comes_twice(proxy: Proxy) -> None:
    proxy.behave(Behaviour(Kind.DUPLICATE), Direction.REQUEST)
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"ab")
    async with asyncio.timeout(DEADLINE_S):
        assert await reader.readexactly(4) == b"abab"
    writer.transport.abort()
    assert proxy.counts[Kind.DUPLICATE] == 1


async def test_a_piece_is_lost_for_good(proxy: Proxy) -> None:
    proxy.behave(Behaviour(Kind.DROP), Direction.REQUEST)
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"lost")
    async with asyncio.timeout(DEADLINE_S):
        while not proxy.counts[Kind.DROP]:
            await asyncio.sleep(0.005)
        writer.write(b"kept")
        assert await reader.readexactly(4) == b"kept"
    writer.transport.abort()


async def test_a_hole_holds_everything_until_it_heals(proxy: Proxy) -> None:
    proxy.behave(Behaviour(Kind.HOLE))
    asking = asyncio.create_task(ask(proxy))
    async with asyncio.timeout(DEADLINE_S):
        while not proxy.counts[Kind.HOLE]:
            await asyncio.sleep(0.005)
    assert not asking.done()
    proxy.heal()
    assert await asking == PAYLOAD


async def test_a_reset_ends_what_is_open_and_what_comes(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"x")
    async with asyncio.timeout(DEADLINE_S):
        assert await reader.read(1) == b"x"
        proxy.behave(Behaviour(Kind.RESET))
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read(1) == b""
    assert await ask(proxy) == b""
    proxy.heal()
    assert await ask(proxy) == PAYLOAD
    writer.transport.abort()
