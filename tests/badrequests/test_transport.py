"""Bad requests, rows 1 to 16: bodies that are no JSON, HTTP that is no HTTP, keys, headers."""

from __future__ import annotations

import asyncio
import gzip
import json
import secrets
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.badrequests.cases import (
    CANARY,
    Case,
    as_bytes,
    chat,
    check_accepted,
    check_error,
    check_refused,
    parametrize,
    talk,
)
from tests.badrequests.conftest import MAX_BODY_BYTES
from tests.gateway_rig import CHAT, COMPLETIONS, MODEL, Rig, rig

pytestmark = pytest.mark.asyncio(loop_scope="module")

JSON, ENCODING = "invalid_json", "invalid_encoding"
GZIP = {"Content-Encoding": "gzip"}
BOMB = gzip.compress(b" " * (1 << 24))
KEY = "sk-right"

REFUSED = [
    Case(1, "not JSON", b"{bad", code=JSON),
    Case(1, "cut off", b'{"messages": [{"role": "user"', code=JSON),
    Case(1, "two objects", b"{}{}", code=JSON),
    Case(1, "a byte order mark before it", b"\xef\xbb\xbf{}", code=JSON),
    Case(1, "a number of 5000 digits", b'{"seed": ' + b"9" * 5000 + b"}", code=JSON),
    Case(2, "empty", b"", code=JSON),
    Case(2, "blank", b"   ", code=JSON),
    *[Case(3, f"not an object: {raw!r}", raw, code=JSON) for raw in (b"[]", b'"x"', b"1", b"null", b"true")],
    Case(4, "not UTF-8", b'{"prompt": "\xff\xfe"}', code=ENCODING),
    Case(4, "UTF-16", '{"prompt": "x"}'.encode("utf-16"), code=ENCODING),
    Case(4, "half a surrogate pair", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', code=ENCODING),
    Case(4, "half a surrogate pair in a name", b'{"\\uDFFF": 1}', code=ENCODING),
    Case(5, "lists 100000 deep", b"[" * 100_000 + b"]" * 100_000, code=JSON),
    Case(5, "objects 100000 deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 413, "request_too_large"),
    Case(5, "lists never closed", b"[" * 100_000, code=JSON),
    Case(5, "a field 800 deep", b'{"tools": ' + b"[" * 800 + b"]" * 800 + b"}", 400, "unsupported_parameter", "tools"),
    *[
        Case(6, f"{word} as a number", b'{"prompt": "x", "temperature": %s}' % word.encode(), param="temperature")
        for word in ("NaN", "Infinity", "-Infinity", "1e999")
    ],
    Case(8, "more bytes than allowed", b'{"x": "' + b"x" * MAX_BODY_BYTES + b'"}', 413, "request_too_large"),
    Case(8, "more values than allowed", b'{"x": [' + b"0," * 270_000 + b"0]}", 413, "request_too_large"),
    Case(9, "compressed", gzip.compress(json.dumps(chat()).encode()), 415, "unsupported_media_type", headers=GZIP),
    Case(9, "a compression bomb", BOMB, 415, "unsupported_media_type", headers=GZIP),
    Case(9, "an encoding nobody knows", chat(), 415, "unsupported_media_type", headers={"Content-Encoding": "zebra"}),
    *[
        Case(11, f"{method} {path}", None, 405, "method_not_allowed", None, path, method)
        for method, path in (
            *(("GET", CHAT), ("GET", COMPLETIONS), ("PUT", CHAT), ("DELETE", CHAT), ("PATCH", COMPLETIONS)),
            *(("GET", "/tokenize"), ("POST", "/live"), ("POST", "/v1/models"), ("OPTIONS", CHAT)),
        )
    ],
    *[
        Case(12, f"{method} {path}", None, 404, "not_found", None, path, method)
        for method, path in (("GET", "/nothing/here"), ("POST", "/v1/chat"), ("GET", "/v2/models"), ("DELETE", "/"))
    ],
]

ACCEPTED = [
    Case(7, "duplicate keys, of which the last counts", b'{"prompt": 7, "prompt": "x"}', path=COMPLETIONS),
    Case(10, "another content type", chat(), headers={"Content-Type": "text/plain"}),
    Case(10, "a content type that makes no sense", chat(), headers={"Content-Type": "zebra"}),
    Case(6, "a number with an exponent", b'{"prompt": "x", "temperature": 1e-1}', path=COMPLETIONS),
]

KEYS = [
    Case(14, "no key", None, 401, "invalid_api_key", None, "/v1/models", "GET"),
    *[
        Case(14, name, chat(), 401, "invalid_api_key", headers={"Authorization": value})
        for name, value in (
            *(("wrong key", "Bearer sk-wrong"), ("wrong scheme", f"Basic {KEY}"), ("no scheme", KEY)),
            *(("empty key", "Bearer "), ("a beginning of the key", f"Bearer {KEY[:-1]}"), ("umlauts", "Bearer ключ")),
        )
    ],
    Case(14, "unknown routes want a key too", None, 401, "invalid_api_key", None, "/nothing", "GET"),
    Case(14, "before the body is read", b"{bad", 401, "invalid_api_key"),
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guarded(redis_url: str) -> AsyncIterator[Rig]:
    async with rig(redis_url, f"bad-{secrets.token_hex(6)}", api_keys=KEY) as one:
        yield one


@parametrize(REFUSED)
async def test_refused(it: Rig, case: Case) -> None:
    await check_refused(it, case)


@parametrize(ACCEPTED)
async def test_accepted(it: Rig, case: Case) -> None:
    await check_accepted(it, case)


@parametrize(KEYS)
async def test_keys(guarded: Rig, case: Case) -> None:
    status, headers, body = await talk(guarded, as_http(case))
    check_error(status, headers, json.loads(body), case)
    assert headers["WWW-Authenticate"] == "Bearer"
    assert guarded.worker.jobs == []
    assert (await guarded.get(f"/v1/models/{MODEL}", headers={"Authorization": f"bearer {KEY}"}))[0] == 200


async def test_the_allow_header_names_the_method(it: Rig) -> None:
    for path in (CHAT, COMPLETIONS, "/tokenize"):
        async with it.session.get(it.url + path) as response:
            assert response.headers["Allow"] == "POST"


async def test_a_chunked_body_over_the_limit(it: Rig) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(2 * MAX_BODY_BYTES >> 16):
            yield b"x" * (1 << 16)

    async with it.session.post(it.url + CHAT, data=chunks()) as response:
        body = await response.json()
        check_error(response.status, response.headers, body, Case(8, "chunked", None, 413, "request_too_large"))


@pytest.mark.parametrize(
    "head",
    [
        b"NONSENSE\r\n\r\n",
        b"GET /live HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(200)) + b"\r\n",
        b"GET /live HTTP/1.1\r\nHost: x\r\nX-Split: a\x00b\r\n\r\n",
        b"POST /live HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /live HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["no HTTP", "version", "long header", "long path", "many headers", "NUL", "length", "two lengths"],
)
async def test_heads_that_are_no_http(it: Rig, head: bytes) -> None:
    (status, headers, body), served = await asyncio.gather(talk(it, head), it.post(COMPLETIONS, CANARY))
    it.worker.jobs.clear()
    check_error(status, headers, json.loads(body), Case(13, "no HTTP", None, 400, "bad_request"))
    assert served[0] == 200


async def test_a_chunked_body_that_is_not_chunked(it: Rig) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    status, headers, body = await talk(it, head.encode() + b"zebra\r\n{}\r\n0\r\n\r\n")
    check_error(status, headers, json.loads(body), Case(13, "chunks", None, 400, "bad_request"))


@pytest.mark.parametrize("given", ["a b", "x" * 200, "<script>", "ö", "a\tb", "a;b=c"])
async def test_a_request_id_that_is_not_harmless_is_replaced(it: Rig, given: str) -> None:
    head = f"GET /live HTTP/1.1\r\nHost: x\r\nx-request-id: {given}\r\nConnection: close\r\n\r\n"
    status, headers, _ = await talk(it, head.encode())
    assert status == 200
    assert len(headers["x-request-id"]) == 32
    assert headers["x-request-id"].isalnum()


async def test_a_harmless_request_id_is_kept(it: Rig) -> None:
    _, _, response = await it.get("/live", headers={"x-request-id": "my-id.7"})
    assert response.headers["x-request-id"] == "my-id.7"


def as_http(case: Case) -> bytes:
    """The request as bytes, so that a header may hold anything."""
    body = as_bytes(case.body)
    fields = {"Host": "x", "Content-Length": str(len(body)), "Connection": "close", **case.headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{case.method} {case.path} HTTP/1.1\r\n{head}\r\n".encode() + body
