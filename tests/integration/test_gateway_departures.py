"""Clients and gateways that leave: the work ends, whoever goes."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

from services.gateway.drain import drain
from tests.gateway_rig import CHAT, COMPLETIONS, MESSAGES, Rig, eventually, rig


async def all_cancelled(it: Rig, count: int) -> None:
    await eventually(lambda: len(it.worker.cancelled) == count, "the worker is told")
    await eventually(lambda: it.metric("requests_in_flight") == 0, "the handler ends")
    assert it.worker.ended == []
    assert it.gateway.admission.in_flight == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_closes_ends_its_request(redis_url: str, deployment: str, stream: bool) -> None:
    async with rig(redis_url, deployment) as it:
        it.worker.gate.clear()
        async with aiohttp.ClientSession() as session:
            task = asyncio.create_task(
                _read_all(session, it.url + CHAT, {"messages": MESSAGES, "stream": stream, "n": 2})
            )
            await eventually(lambda: it.metric("time_to_first_token_seconds_count") == 1, "it runs")
            task.cancel()
        await all_cancelled(it, 1)
        assert it.metric("requests_total", route=CHAT, outcome="cancelled") == 1


async def test_all_prompts_of_a_request_end_together(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        it.worker.gate.clear()
        async with aiohttp.ClientSession() as session:
            task = asyncio.create_task(_read_all(session, it.url + COMPLETIONS, {"prompt": ["a", "b", "c"]}))
            await eventually(lambda: len(it.worker.jobs) == 3, "all run")
            task.cancel()
        await all_cancelled(it, 3)


async def test_a_client_that_leaves_the_queue_takes_nothing_with_it(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, gateway={"max_in_flight": 1}) as it:
        it.worker.gate.clear()
        async with aiohttp.ClientSession() as session:
            first = asyncio.create_task(_read_all(session, it.url + CHAT, {"messages": MESSAGES}))
            await eventually(lambda: len(it.worker.jobs) == 1, "one runs")
            second = asyncio.create_task(_read_all(session, it.url + CHAT, {"messages": MESSAGES}))
            await eventually(lambda: it.gateway.admission.queued == 1, "one waits")
            second.cancel()
            await eventually(lambda: it.gateway.admission.queued == 0, "it left")
            it.worker.gate.set()
            assert b"Hello there!" in await first
    assert len(it.worker.jobs) == 1


async def test_half_a_request_and_gone(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        host, port = it.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        await eventually(lambda: it.metric("requests_in_flight") == 1, "it is being read")
        writer.close()
        await eventually(lambda: it.metric("requests_in_flight") == 0, "it is dropped")
        assert it.metric("requests_total", route=CHAT, outcome="cancelled") == 1
        assert it.worker.jobs == []


async def test_a_drain_finishes_what_runs_and_takes_nothing_new(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        it.worker.gate.clear()
        running = asyncio.create_task(it.post(CHAT, {"messages": MESSAGES}))
        await eventually(lambda: len(it.worker.jobs) == 1, "one runs")
        draining = asyncio.create_task(drain(it.gateway, 20))
        await eventually(lambda: it.gateway.cluster.draining, "the drain begins")
        assert (await it.get("/live"))[0] == 200
        status, report, _ = await it.get("/health")
        assert (status, report["reasons"]) == (503, ["the gateway is draining"])
        status, body, response = await it.post(CHAT, {"messages": MESSAGES})
        assert (status, body["error"]["code"]) == (503, "draining")
        assert response.headers["Connection"] == "close"
        assert not draining.done()
        it.worker.gate.set()
        assert (await running)[0] == 200
        async with asyncio.timeout(5):
            await draining


async def test_a_drain_does_not_wait_for_ever_and_lets_the_request_go_on(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        it.worker.gate.clear()
        running = asyncio.create_task(it.post(CHAT, {"messages": MESSAGES}))
        await eventually(lambda: len(it.worker.jobs) == 1, "one runs")
        async with asyncio.timeout(10):
            await drain(it.gateway, 0.05)
            status, body, response = await running
        assert (status, body["error"]["code"]) == (503, "draining")
        assert "Retry-After" in response.headers
        assert it.gateway.admission.in_flight == 0
        it.worker.gate.set()
        await eventually(lambda: len(it.worker.ended) == 1, "the worker was not told to stop")


async def test_a_gateway_that_stops_takes_its_heartbeat_off(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        gateway_id = it.gateway.cluster._gateway_id
        registry = it.gateway.cluster._registry
        assert await registry.dead_gateways([gateway_id]) == set()
    async with rig(redis_url, deployment) as other:
        assert await other.gateway.cluster._registry.dead_gateways([gateway_id]) == {gateway_id}


async def _read_all(session: aiohttp.ClientSession, url: str, body: object) -> bytes:
    async with session.post(url, data=json.dumps(body)) as response:
        return await response.read()


@pytest.mark.parametrize("command", ["save", "open"])
async def test_a_cancellation_that_the_redis_client_swallows_is_heeded(
    redis_url: str, deployment: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client leaves while Redis is told about its request, and the command comes back as if nothing had been."""
    async with rig(redis_url, deployment) as it, aiohttp.ClientSession() as session:
        owner = it.gateway.responses if command == "save" else it.gateway.streams
        genuine, waiting = getattr(owner, command), asyncio.Event()

        async def swallowing(*args: Any, **how: Any) -> Any:
            waiting.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return await genuine(*args, **how)

        monkeypatch.setattr(owner, command, swallowing)
        it.worker.gate.clear()
        task = asyncio.create_task(_read_all(session, it.url + CHAT, {"messages": MESSAGES}))
        async with asyncio.timeout(10):
            await waiting.wait()
        task.cancel()
        await eventually(lambda: it.gateway.admission.in_flight == 0, "its place is free again")
        await eventually(lambda: it.metric("requests_total", route=CHAT, outcome="cancelled") == 1, "it is counted")
