"""The bounds of the listener, on a bare aiohttp application: heads, idle connections, too many of them."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop
from aiohttp import web

from services.gateway import connections
from services.gateway.connections import room_for_connections
from services.gateway.server import listen
from shared.config import GatewaySettings

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Site:
    """A server with one route that answers while `gate` is set, and raw connections to it."""

    port: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    serving: int = 0
    count: Any = None

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def handle(self, _request: web.Request) -> web.Response:
        self.serving += 1
        await self.gate.wait()
        return web.Response(text="fine")


@asynccontextmanager
async def site(**settings: Any) -> AsyncIterator[Site]:
    it = Site()
    it.gate.set()
    app = web.Application()
    app.router.add_get("/", it.handle)
    app.router.add_post("/", it.handle)

    def keep(count: Any) -> None:
        it.count = count

    async with listen(app, GatewaySettings(port=0, **settings), keep) as url:
        it.port = int(url.rpartition(":")[2])
        try:
            yield it
        finally:
            it.gate.set()
            for writer in it.writers:
                writer.close()


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(10):
        return await reader.readuntil(b"fine")


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Wait for the end of a connection that says nothing more."""
    async with asyncio.timeout(10):
        try:
            return await reader.read() == b""
        except ConnectionError:
            return True


async def until(check: Any, what: str) -> None:
    async with asyncio.timeout(10):
        while not check():
            await asyncio.sleep(0.005)
    assert check(), what


@pytest.mark.parametrize("head", [b"G", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_half_a_head_is_not_waited_for(head: bytes) -> None:
    async with site(header_timeout_s=0.1, keepalive_timeout_s=3600) as it:
        reader, writer = await it.connect()
        writer.write(head)
        assert await is_closed(reader)


async def test_a_head_that_comes_byte_by_byte_gets_no_more_time_for_it() -> None:
    async with site(header_timeout_s=0.3, keepalive_timeout_s=3600) as it:
        reader, writer = await it.connect()
        writer.write(b"GET / HTTP/1.1\r\nX-Slow: ")
        ended = asyncio.create_task(is_closed(reader))
        async with asyncio.timeout(10):
            while not ended.done():
                writer.write(b"x")
                await asyncio.sleep(0.02)
        assert ended.result()


async def test_the_second_head_of_a_connection_has_a_deadline_too() -> None:
    async with site(header_timeout_s=0.1, keepalive_timeout_s=3600) as it:
        reader, writer = await it.connect()
        writer.write(GET)
        await read_answer(reader)
        writer.write(b"GET / HT")
        assert await is_closed(reader)


async def test_a_handler_takes_its_time_and_the_connection_stays() -> None:
    async with site(header_timeout_s=0.05, keepalive_timeout_s=3600) as it:
        it.gate.clear()
        reader, writer = await it.connect()
        writer.write(GET)
        await until(lambda: it.serving == 1, "served")
        slow_reader, slow_writer = await it.connect()
        slow_writer.write(b"GET /")
        assert await is_closed(slow_reader), "the deadline of a head has passed by now"
        it.gate.set()
        await read_answer(reader)
        writer.write(GET)
        await read_answer(reader)


@pytest.mark.parametrize("after", [b"", GET])
async def test_a_silent_connection_is_closed(after: bytes) -> None:
    async with site(keepalive_timeout_s=0.1) as it:
        reader, writer = await it.connect()
        if after:
            writer.write(after)
            await read_answer(reader)
        assert await is_closed(reader)


async def test_the_longest_idle_connection_makes_room() -> None:
    async with site(max_connections=3, keepalive_timeout_s=3600) as it:
        held = []
        for _ in range(3):
            reader, writer = await it.connect()
            writer.write(GET)
            await read_answer(reader)
            held.append((reader, writer))
        held[0][1].write(GET)
        await read_answer(held[0][0])
        reader, writer = await it.connect()
        writer.write(GET)
        await read_answer(reader)
        assert await is_closed(held[1][0]), "the first was used again meanwhile"
        for reader, writer in (held[0], held[2]):
            writer.write(GET)
            await read_answer(reader)
        assert it.count() == 3


async def test_when_all_are_served_a_new_one_is_told_so() -> None:
    async with site(max_connections=2, keepalive_timeout_s=3600) as it:
        it.gate.clear()
        held = [await it.connect() for _ in range(2)]
        for _, writer in held:
            writer.write(GET)
        await until(lambda: it.serving == 2, "both served")
        reader, writer = await it.connect()
        writer.write(GET)
        async with asyncio.timeout(10):
            answer = await reader.read()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 1" in head
        assert b"\r\nConnection: close" in head
        assert b'"code": "overloaded"' in body
        it.gate.set()
        for reader, _ in held:
            await read_answer(reader)


def test_the_loop_that_the_gateway_runs_on_tells_it_too() -> None:
    async def main() -> None:
        async with site(max_connections=1, keepalive_timeout_s=3600) as it:
            it.gate.clear()
            held, writer = await it.connect()
            writer.write(GET)
            await until(lambda: it.serving == 1, "served")
            reader, _ = await it.connect()
            async with asyncio.timeout(10):
                assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
            it.gate.set()
            await read_answer(held)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_many_idle_connections_lock_nobody_out() -> None:
    """A small form of ten thousand: more silent connections than there is room for, and everybody else is served."""
    async with site(max_connections=200, keepalive_timeout_s=3600) as it:
        for _ in range(300):
            await it.connect()
        for _ in range(20):
            reader, writer = await it.connect()
            writer.write(GET)
            await read_answer(reader)
        assert it.count() <= 200


async def test_refusals_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_REFUSALS", 1)
    monkeypatch.setattr(connections, "LINGER_S", 3600.0)
    async with site(max_connections=1, keepalive_timeout_s=3600) as it:
        it.gate.clear()
        reader, writer = await it.connect()
        writer.write(GET)
        await until(lambda: it.serving == 1, "served")
        first, _ = await it.connect()
        async with asyncio.timeout(10):
            assert (await first.readline()).startswith(b"HTTP/1.1 503")
        second, _ = await it.connect()
        assert await is_closed(second)
        it.gate.set()
        await read_answer(reader)


def test_open_files_bound_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, wanted, room in ((1024, 4096, 768), (8192, 4096, 4096), (100, 50, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert room_for_connections(wanted) == room
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert room_for_connections(4096) == 4096


def test_the_limit_on_open_files_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(256, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    assert connections.raise_open_files() == 4096
    assert connections.raise_open_files() == 4096
    assert limits == [(256, 4096), (4096, 4096)]
