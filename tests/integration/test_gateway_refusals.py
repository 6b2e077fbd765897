"""What is refused because of the state of things: full, no workers, no key. Bad requests: tests/badrequests."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from services.gateway.app import serve
from services.gateway.drain import drain
from shared.errors import ConfigurationError
from tests.gateway_rig import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    MODEL,
    Rig,
    eventually,
    make_model,
    make_settings,
    rig,
)

CHAT_BODY = {"messages": MESSAGES}


@pytest_asyncio.fixture
async def it(redis_url: str, deployment: str) -> AsyncIterator[Rig]:
    async with rig(redis_url, deployment, gateway={"max_body_bytes": 1 << 20, "max_prompts": 4}) as one:
        yield one


def check_error(body: Any, code: str, param: str | None = None) -> None:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)


async def test_nothing_refused_reached_a_worker_and_the_next_request_is_served(it: Rig) -> None:
    bodies: list[dict[str, Any]] = [{}, {"messages": []}, {**CHAT_BODY, "n": 10**9}, {**CHAT_BODY, "stop": ""}]
    for body in bodies:
        assert (await it.post(CHAT, body))[0] == 400
    assert it.worker.jobs == []
    assert (await it.post(CHAT, CHAT_BODY))[0] == 200
    received = it.metric("requests_received_total")
    ends = [it.metric("requests_total", route=CHAT, outcome=outcome) for outcome in ("finished", "rejected")]
    assert received == sum(ends) == 5
    assert it.metric("requests_in_flight") == 0
    assert it.metric("rejections_total", reason="invalid_value") == 4
    assert (await it.get("/nothing/here"))[0] == 404
    assert it.metric("http_responses_total", route="unknown", status="404") == 1


async def test_a_request_no_live_pool_can_hold(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, max_request_tokens=64) as it:
        status, answer, _ = await it.post(COMPLETIONS, {"prompt": "Hello", "max_tokens": 100})
        assert status == 400
        assert answer["error"]["message"].startswith("This model's maximum context length is 64 tokens")
        assert (await it.post(CHAT, CHAT_BODY))[0] == 200
        assert it.worker.jobs[0].params.max_tokens == 64 - len(it.worker.jobs[0].prompt_ids)


async def test_without_workers_nothing_is_taken(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        it.worker.roles = ["prefill"]
        await it.worker.beat()
        await eventually(lambda: not it.gateway.cluster.ready("decode"), "the decode worker is gone")
        status, answer, response = await it.post(CHAT, CHAT_BODY)
        assert status == 503
        check_error(answer, "no_workers")
        assert "decode" in answer["error"]["message"]
        assert int(response.headers["Retry-After"]) >= 1


async def test_full_means_503_and_a_keys_share_429(redis_url: str, deployment: str) -> None:
    settings = {"max_in_flight": 2, "max_queued": 1, "max_in_flight_per_key": 2}
    async with rig(redis_url, deployment, gateway=settings, api_keys="one,two,three") as it:
        it.worker.gate.clear()
        running = [asyncio.create_task(post_with_key(it, key)) for key in ("one", "one", "two")]
        await eventually(lambda: it.gateway.admission.queued == 1, "two run and one waits")
        status, answer, response = await post_with_key(it, "one")
        assert (status, response.headers["Retry-After"].isdigit()) == (429, True)
        check_error(answer, "rate_limit_exceeded")
        status, answer, _ = await post_with_key(it, "three")
        assert status == 503
        check_error(answer, "overloaded")
        it.worker.gate.set()
        assert [status for status, _, _ in await asyncio.gather(*running)] == [200, 200, 200]
        assert it.metric("rejections_total", reason="rate_limit_exceeded") == 1
        assert it.metric("rejections_total", reason="overloaded") == 1


async def post_with_key(it: Rig, key: str) -> tuple[int, Any, aiohttp.ClientResponse]:
    return await it.post(CHAT, CHAT_BODY, headers={"Authorization": f"Bearer {key}"})


async def test_every_route_but_two_wants_a_key(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, api_keys="sk-1, sk-2") as it:
        for path in ("/v1/models", f"/v1/models/{MODEL}", "/metrics", "/version", "/nothing", CHAT):
            async with it.session.get(it.url + path) as response:
                assert response.status == 401, path
                assert response.headers["WWW-Authenticate"] == "Bearer"
                check_error(await response.json(), "invalid_api_key")
        for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
            status, body, _ = await it.post(path, b"{bad", headers={"Authorization": "Bearer sk-3"})
            assert status == 401
            assert body["error"]["type"] == "authentication_error"
        for path in ("/live", "/health"):
            assert (await it.get(path))[0] == 200
        for key in ("sk-1", "sk-2"):
            status, _, _ = await post_with_key(it, key)
            assert status == 200
    tenants = {job.tenant for job in it.worker.jobs}
    assert len(tenants) == 2
    assert "" not in tenants, "keys do not share cached prompts"


async def test_a_body_that_never_comes_is_not_waited_for(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, gateway={"body_timeout_s": 0.1}) as it:
        host, port = it.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), 10)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer


async def test_a_request_head_that_never_ends_is_not_waited_for(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, gateway={"keepalive_timeout_s": 0.2}) as it:
        host, port = it.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_a_deadline_ends_a_request_that_nobody_computes(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, gateway={"request_timeout_s": 0.3}) as it:
        it.worker.gate.clear()
        status, answer, response = await it.post(CHAT, CHAT_BODY)
    assert status == 504
    check_error(answer, "deadline_exceeded")
    assert response.headers["x-should-retry"] == "false"


def test_the_port_being_taken_is_said(redis_url: str, deployment: str) -> None:
    async def start(port: int) -> None:
        settings = make_settings(redis_url, deployment, gateway={"port": port})
        async with serve(settings, make_model()):
            raise AssertionError("it listens on a port that is taken")

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigurationError, match="SLIPSTREAM_GATEWAY__PORT"):
            asyncio.run(start(taken.getsockname()[1]))


async def test_bodies_under_way_share_a_bound_of_memory(redis_url: str, deployment: str) -> None:
    """Slow senders of large bodies must not add up; what they held is free again when they leave."""
    large = {"prompt": "x" * 8000}
    async with rig(redis_url, deployment, gateway={"max_bodies_bytes": 16_000}) as it:
        address = it.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(address[0], int(address[1]))
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 12000\r\n\r\n"
        writer.write(head.encode() + b" " * 11_999)
        await writer.drain()
        async with asyncio.timeout(10):
            while (answer := await it.post(COMPLETIONS, large))[0] == 400:
                await asyncio.sleep(0.01)
            assert answer[0] == 503
            check_error(answer[1], "overloaded")
            writer.close()
            while (answer := await it.post(COMPLETIONS, large))[0] == 503:
                await asyncio.sleep(0.01)
        check_error(answer[1], "context_length_exceeded", "prompt")


async def test_a_drain_that_runs_out_of_time_refuses_who_still_waits(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, gateway={"max_in_flight": 1}) as it:
        it.worker.gate.clear()
        running = asyncio.create_task(it.post(COMPLETIONS, {"prompt": "x"}))
        await eventually(lambda: it.gateway.admission.in_flight == 1, "one runs")
        waiting = asyncio.create_task(it.post(COMPLETIONS, {"prompt": "x"}))
        await eventually(lambda: it.gateway.admission.queued == 1, "one waits")
        await drain(it.gateway, timeout_s=0.1)
        for answer in await asyncio.gather(running, waiting):
            assert answer[0] == 503
            check_error(answer[1], "draining")
            assert answer[2].headers["Retry-After"]
        assert it.gateway.admission.in_flight == it.gateway.admission.queued == 0
