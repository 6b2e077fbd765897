"""The WebSocket at the chat route: chunks, ends, cancel, bad frames, limits."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import ClientWebSocketResponse, WSMsgType

from services.gateway.drain import drain
from tests.gateway_rig import CHAT, CODEC, MESSAGES, Rig, eventually, rig

BODY = {"messages": MESSAGES}


def connect(it: Rig, **options: Any) -> Any:
    return it.session.ws_connect(it.url + CHAT, **options)


async def frames_to_the_end(socket: ClientWebSocketResponse) -> list[dict[str, Any]]:
    """Frames up to and with the one that ends a request."""
    frames: list[dict[str, Any]] = []
    while True:
        frames.append(await socket.receive_json(timeout=10))
        if frames[-1].get("type") in ("done", "error"):
            return frames


def text_of(frames: list[dict[str, Any]]) -> str:
    choices = [frame["choices"][0] for frame in frames if frame.get("choices")]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def test_a_body_in_and_chunks_out_several_times_on_one_socket(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it, connect(it) as socket:
        for _ in range(2):
            await socket.send_json(BODY)
            frames = await frames_to_the_end(socket)
            assert frames[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert frames[0]["object"] == "chat.completion.chunk"
            assert text_of(frames) == "Hello there!"
            assert frames[-1] == {"type": "done", "id": frames[0]["id"], "status": "finished"}
        assert it.metric("websockets_open") == 1
        assert it.metric("requests_total", route=CHAT, outcome="finished") == 2
    await eventually(lambda: it.metric("websockets_open") == 0, "the socket is gone")


async def test_usage_comes_last_on_request(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it, connect(it) as socket:
        await socket.send_json({**BODY, "stream_options": {"include_usage": True}})
        frames = await frames_to_the_end(socket)
    assert frames[-2]["usage"]["completion_tokens"] == len(CODEC.encode("Hello there!")) + 1


async def test_cancel_stops_the_work_and_the_socket_goes_on(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it, connect(it) as socket:
        it.worker.gate.clear()
        await socket.send_json(BODY)
        role = await socket.receive_json(timeout=10)
        await socket.receive_json(timeout=10)
        await socket.send_json({"type": "cancel"})
        assert await socket.receive_json(timeout=10) == {"type": "done", "id": role["id"], "status": "cancelled"}
        await eventually(lambda: len(it.worker.cancelled) == 1, "the worker is told")
        assert it.metric("requests_total", route=CHAT, outcome="cancelled") == 1
        await socket.send_json({"type": "cancel"})
        it.worker.gate.set()
        await socket.send_json(BODY)
        frames = await frames_to_the_end(socket)
        assert frames[-1]["status"] == "finished"


async def test_a_cancel_right_behind_the_body_is_answered(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it, connect(it) as socket:
        it.worker.gate.clear()
        await socket.send_json(BODY)
        await socket.send_json({"type": "cancel"})
        frames = await frames_to_the_end(socket)
        assert (frames[-1]["type"], frames[-1]["status"]) == ("done", "cancelled")


@pytest.mark.parametrize(
    ("frame", "code", "param"),
    [
        ("{bad", "invalid_json", None),
        ("[]", "invalid_json", None),
        ("{}", "invalid_value", "messages"),
        (json.dumps({**BODY, "temperature": 9}), "invalid_value", "temperature"),
    ],
)
async def test_a_bad_frame_is_an_error_and_the_socket_stays_open(
    redis_url: str, deployment: str, frame: str, code: str, param: str | None
) -> None:
    async with rig(redis_url, deployment) as it, connect(it) as socket:
        await socket.send_str(frame)
        answer = await socket.receive_json(timeout=10)
        assert (answer["type"], answer["id"]) == ("error", None)
        assert (answer["error"]["code"], answer["error"]["param"]) == (code, param)
        await socket.send_bytes(b"x")
        assert (await socket.receive_json(timeout=10))["type"] == "error"
        await socket.send_json(BODY)
        assert (await frames_to_the_end(socket))[-1]["type"] == "done"


async def test_what_fails_later_is_an_error_too(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it, connect(it) as socket:
        await socket.send_json({**BODY, "model": "gpt-17"})
        [frame] = await frames_to_the_end(socket)
        assert frame["error"]["code"] == "model_not_found"
        it.worker.fail_with = ("engine_error", "it broke")
        await socket.send_json(BODY)
        frame = (await frames_to_the_end(socket))[-1]
        assert (frame["type"], frame["error"]["code"]) == ("error", "engine_error")
        assert frame["id"].startswith("chatcmpl-")
        it.worker.fail_with = None
        await socket.send_json(BODY)
        assert (await frames_to_the_end(socket))[-1]["type"] == "done"


async def test_one_request_at_a_time(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it, connect(it) as socket:
        it.worker.gate.clear()
        await socket.send_json(BODY)
        role = await socket.receive_json(timeout=10)
        await socket.receive_json(timeout=10)
        await socket.send_json(BODY)
        refused = await socket.receive_json(timeout=10)
        assert (refused["error"]["code"], refused["id"]) == ("request_running", None)
        it.worker.gate.set()
        frames = await frames_to_the_end(socket)
        assert (frames[-1]["type"], frames[-1]["id"]) == ("done", role["id"])


async def test_closing_the_socket_cancels(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        it.worker.gate.clear()
        async with connect(it) as socket:
            await socket.send_json(BODY)
            await socket.receive_json(timeout=10)
            await socket.receive_json(timeout=10)
        await eventually(lambda: len(it.worker.cancelled) == 1, "the worker is told")
        await eventually(lambda: it.metric("requests_in_flight") == 0, "the request ends")


async def test_a_frame_over_the_limit_closes_with_1009(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, gateway={"max_body_bytes": 4096}) as it, connect(it) as socket:
        await socket.send_str("x" * 5000)
        message = await socket.receive(timeout=10)
        assert message.type is WSMsgType.CLOSE
        assert socket.close_code == 1009


async def test_frames_share_the_bound_of_memory_with_bodies(redis_url: str, deployment: str) -> None:
    """A frame is refused while bodies hold the memory, read when they are gone, and holds nothing afterwards."""
    large = {"messages": [{"role": "user", "content": "x" * 8000}]}
    async with rig(redis_url, deployment, gateway={"max_bodies_bytes": 16_000}) as it, connect(it) as socket:

        async def refusal() -> str:
            await socket.send_json(large)
            frame = await socket.receive_json(timeout=10)
            return str(frame["error"]["code"])

        address = it.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(address[0], int(address[1]))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 12000\r\n\r\n"
        writer.write(head.encode() + b" " * 11_999)
        await writer.drain()
        async with asyncio.timeout(10):
            while (await it.post(CHAT, large))[0] != 503:
                await asyncio.sleep(0.01)
            assert await refusal() == "overloaded"
            writer.close()
            while (code := await refusal()) == "overloaded":
                await asyncio.sleep(0.01)
        assert [code, await refusal(), await refusal()] == ["context_length_exceeded"] * 3
        await socket.send_json(BODY)
        assert (await frames_to_the_end(socket))[-1]["type"] == "done"


async def test_a_drain_closes_idle_sockets_with_1001(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it, connect(it) as socket:
        await socket.send_json(BODY)
        await frames_to_the_end(socket)
        await drain(it.gateway, 5)
        assert (await socket.receive(timeout=10)).type is WSMsgType.CLOSE
        assert socket.close_code == 1001
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await connect(it)
        assert caught.value.status == 503


async def test_keys_origins_and_numbers_are_checked_at_the_handshake(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, api_keys="sk", gateway={"max_websockets": 1}) as it:
        good = {"Authorization": "Bearer sk"}
        for headers, status in (({}, 401), ({**good, "Origin": "http://evil.example"}, 403)):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await connect(it, headers=headers)
            assert caught.value.status == status
        async with connect(it, headers={**good, "Origin": it.url}) as socket:
            await socket.send_json(BODY)
            assert (await frames_to_the_end(socket))[-1]["type"] == "done"
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await connect(it, headers=good)
            assert caught.value.status == 503
