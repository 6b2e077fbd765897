"""What is refused over HTTP, with which status, and that nothing of it reaches a worker."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from services.gateway.app import serve
from shared.errors import ConfigurationError
from tests.gateway_rig import (
    CHAT,
    CODEC,
    COMPLETIONS,
    CONTEXT,
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


async def test_bodies_that_are_no_request(it: Rig) -> None:
    for raw, code in ((b"{bad", "invalid_json"), (b"", "invalid_json"), (b"[]", "invalid_json")):
        status, body, response = await it.post(CHAT, raw)
        assert status == 400
        check_error(body, code)
        assert response.headers["x-request-id"]
        assert response.content_type == "application/json"
    status, body, _ = await it.post(CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}')
    check_error(body, "invalid_encoding")
    assert it.worker.jobs == []
    assert it.metric("requests_total", route=CHAT, outcome="rejected") == 4
    assert it.metric("rejections_total", reason="invalid_json") == 3


async def test_fields_are_named_over_http_too(it: Rig) -> None:
    status, body, _ = await it.post(CHAT, {**CHAT_BODY, "temperature": 3})
    assert status == 400
    check_error(body, "invalid_value", "temperature")
    status, body, _ = await it.post(CHAT, {"messages": [{"role": "x"}]})
    check_error(body, "invalid_value", "messages[0].role")
    status, body, _ = await it.post(CHAT, {**CHAT_BODY, "tools": [{"type": "function"}]})
    check_error(body, "unsupported_parameter", "tools")


async def test_a_body_over_the_limit(it: Rig) -> None:
    big = b'{"messages": "' + b"x" * (2 << 20) + b'"}'
    status, body, _ = await it.post(CHAT, big)
    assert status == 413
    check_error(body, "request_too_large")

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(big), 1 << 16):
            yield big[start : start + (1 << 16)]

    async with it.session.post(it.url + CHAT, data=chunks()) as response:
        assert response.status == 413
        check_error(await response.json(), "request_too_large")


async def test_a_compressed_body_is_not_unpacked(it: Rig) -> None:
    bomb = gzip.compress(b" " * (1 << 24))
    status, body, _ = await it.post(CHAT, bomb, headers={"Content-Encoding": "gzip"})
    assert status == 415
    check_error(body, "unsupported_media_type")


async def test_any_content_type_is_read_as_json(it: Rig) -> None:
    status, _, _ = await it.post(CHAT, CHAT_BODY, headers={"Content-Type": "text/plain"})
    assert status == 200


async def test_unknown_routes_and_wrong_methods(it: Rig) -> None:
    status, body, _ = await it.get("/nothing/here")
    assert status == 404
    check_error(body, "not_found")
    for path in (CHAT, COMPLETIONS, "/tokenize"):
        status, body, response = await it.get(path)
        assert (status, response.headers["Allow"]) == (405, "POST")
        check_error(body, "method_not_allowed")
    status, body, _ = await it.post("/live", {})
    assert status == 405
    assert it.metric("http_responses_total", route="unknown", status="404") == 1


async def test_requests_that_are_no_http(it: Rig) -> None:
    host, port = it.url.removeprefix("http://").split(":")
    for raw in (b"NONSENSE\r\n\r\n", b"GET /live HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw)
        answer = (await asyncio.wait_for(reader.read(), 10)).decode()
        writer.close()
        head, _, body = answer.partition("\r\n\r\n")
        assert head.split()[1] == "400"
        assert "x-request-id" in head.lower()
        check_error(json.loads(body), "bad_request")


async def test_a_harmless_request_id_is_echoed_and_any_other_replaced(it: Rig) -> None:
    _, _, response = await it.get("/live", headers={"x-request-id": "my-id.7"})
    assert response.headers["x-request-id"] == "my-id.7"
    for bad in ("a b", "x" * 200, "<script>"):
        _, _, response = await it.get("/live", headers={"x-request-id": bad})
        assert response.headers["x-request-id"] != bad
        assert len(response.headers["x-request-id"]) == 32


async def test_models_that_are_not_here(it: Rig) -> None:
    for path, body in ((CHAT, CHAT_BODY), (COMPLETIONS, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        status, answer, _ = await it.post(path, {**body, "model": "gpt-17"})
        assert status == 404
        check_error(answer, "model_not_found", "model")
    status, answer, _ = await it.get("/v1/models/gpt-17")
    assert status == 404


async def test_prompts_that_do_not_fit(it: Rig) -> None:
    words = f"This model's maximum context length is {CONTEXT} tokens"
    ids = CODEC.encode("Hello") * CONTEXT
    for body in ({"prompt": ids}, {"prompt": "Hello " * CONTEXT}, {"prompt": "a", "max_tokens": CONTEXT}):
        status, answer, _ = await it.post(COMPLETIONS, body)
        assert status == 400
        check_error(answer, "context_length_exceeded", "prompt")
        assert answer["error"]["message"].startswith(words)
    status, answer, _ = await it.post(CHAT, {"messages": [{"role": "user", "content": "Hello " * CONTEXT}]})
    check_error(answer, "context_length_exceeded", "messages")


async def test_a_flood_of_text_is_refused_before_it_is_tokenised(it: Rig) -> None:
    started = time.monotonic()
    status, answer, _ = await it.post(COMPLETIONS, {"prompt": "a" * 900_000})
    assert status == 400
    check_error(answer, "context_length_exceeded", "prompt")
    assert time.monotonic() - started < 5


async def test_token_ids_and_counts_out_of_range(it: Rig) -> None:
    status, answer, _ = await it.post(COMPLETIONS, {"prompt": [CODEC.vocab_size]})
    check_error(answer, "invalid_value", "prompt")
    status, answer, _ = await it.post(COMPLETIONS, {"prompt": ["a"] * 5})
    assert status == 400
    check_error(answer, "invalid_value", "prompt")
    status, answer, _ = await it.post("/detokenize", {"tokens": [CODEC.vocab_size]})
    check_error(answer, "invalid_value", "tokens")
    status, answer, _ = await it.post("/detokenize", {"tokens": [1] * (CONTEXT + 1)})
    check_error(answer, "invalid_value", "tokens")


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
