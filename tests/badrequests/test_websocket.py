"""Bad requests, rows 73 and 74: frames and handshakes. A bad frame is answered and the socket stays open."""

from __future__ import annotations

import json
import secrets
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType

from tests.badrequests.cases import TYPES, chat, check_error_object
from tests.badrequests.conftest import MAX_BODY_BYTES
from tests.gateway_rig import CHAT, Rig, rig

pytestmark = pytest.mark.asyncio(loop_scope="module")

TIMEOUT_S = 20
DEEP = "[" * 100_000

FRAMES: list[tuple[str, Any, str, str | None]] = [
    ("not JSON", "{bad", "invalid_json", None),
    ("empty", "", "invalid_json", None),
    ("a list", "[]", "invalid_json", None),
    ("a number", "7", "invalid_json", None),
    ("lists 100000 deep", DEEP, "invalid_json", None),
    ("half a surrogate pair", '{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_encoding", None),
    ("binary", b"{}", "invalid_value", None),
    ("no messages", {}, "invalid_value", "messages"),
    ("an event nobody knows", {"type": "zebra.create"}, "invalid_value", "messages"),
    ("a bad field", chat(temperature=9), "invalid_value", "temperature"),
    ("an unsupported field", chat(tools=[]), "unsupported_parameter", "tools"),
    ("more values than allowed", "[" + "0," * 270_000 + "0]", "request_too_large", None),
    (
        "a deep field",
        '{"chat_template_kwargs": {"a": ' + "[" * 900 + "]" * 900 + "}}",
        "invalid_value",
        "chat_template_kwargs",
    ),
    ("prompt_logprobs, as frames are streamed", chat(prompt_logprobs=1), "invalid_value", "prompt_logprobs"),
]


@pytest.mark.parametrize(("name", "frame", "code", "param"), FRAMES, ids=[frame[0] for frame in FRAMES])
async def test_a_bad_frame_is_an_error_and_the_socket_stays_open(
    it: Rig, name: str, frame: Any, code: str, param: str | None
) -> None:
    async with it.session.ws_connect(it.url + CHAT) as socket:
        if isinstance(frame, bytes):
            await socket.send_bytes(frame)
        else:
            await socket.send_str(frame if isinstance(frame, str) else json.dumps(frame))
        answer = await socket.receive_json(timeout=TIMEOUT_S)
        assert (answer["type"], answer["id"]) == ("error", None)
        assert (answer["error"]["code"], answer["error"]["param"]) == (code, param)
        status = 413 if code == "request_too_large" else 400
        check_error_object(answer["error"], TYPES[status], frame)
        await socket.send_json(chat(max_tokens=1))
        while (answer := await socket.receive_json(timeout=TIMEOUT_S)).get("type") != "done":
            assert answer.get("type") != "error"
    it.worker.jobs.clear()


async def test_a_frame_over_the_limit_closes_with_1009(it: Rig) -> None:
    async with it.session.ws_connect(it.url + CHAT) as socket:
        await socket.send_str("x" * (MAX_BODY_BYTES + 1))
        message = await socket.receive(timeout=TIMEOUT_S)
        assert message.type is WSMsgType.CLOSE
        assert socket.close_code == 1009


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1", ""])
async def test_pages_of_other_servers_are_refused_at_the_handshake(it: Rig, origin: str) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await it.session.ws_connect(it.url + CHAT, headers={"Origin": origin})
    assert caught.value.status == 403


async def test_without_a_key_there_is_no_handshake(redis_url: str) -> None:
    async with rig(redis_url, f"bad-{secrets.token_hex(6)}", api_keys="sk-right") as guarded:
        for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"Sec-WebSocket-Protocol": "sk-right"}):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await guarded.session.ws_connect(guarded.url + CHAT, headers=headers)
            assert caught.value.status == 401
