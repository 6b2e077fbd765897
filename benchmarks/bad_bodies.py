"""The bad requests that are too heavy for the tables of the tests: megabytes, bombs, floods of slow connections."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.badrequests.cases import Case, chat
from tests.gateway_rig import CHAT, COMPLETIONS

MB = 1 << 20
LIMIT = 16 * MB
"""The default of gateway.max_body_bytes."""

VALUES = 1 << 17
"""How many values a body may have at the context of this benchmark."""

CHUNKED = {"Transfer-Encoding": "chunked"}
USER = '{"role": "user", "content": "x"}'


@dataclass(frozen=True, slots=True)
class Flood:
    """Connections that send `head` and then one more byte of `rest` every `pause_s`."""

    row: int
    name: str
    connections: int
    head: str
    rest: str
    pause_s: float = 0.2

    @contextmanager
    def running(self, address: str, key: str) -> Iterator[None]:
        host, _, port = address.partition(":")
        stop = threading.Event()
        sockets = [socket.create_connection((host, int(port)), timeout=10) for _ in range(self.connections)]
        for one in sockets:
            one.sendall(self.head.replace("KEY", key).encode())
        thread = threading.Thread(target=self._trickle, args=(sockets, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(30)
            for one in sockets:
                one.close()

    def _trickle(self, sockets: list[socket.socket], stop: threading.Event) -> None:
        open_ones = list(sockets)
        for byte in self.rest * 1000:
            for one in list(open_ones):
                try:
                    one.sendall(byte.encode())
                except OSError:
                    open_ones.remove(one)
            if stop.wait(self.pause_s):
                return


def chunked(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 64 * 1024):
        yield body[start : start + 64 * 1024]


def raw(template: str, piece: str, size: int) -> bytes:
    """`template` with `…` replaced by as many pieces as make a body of `size` bytes."""
    count = (size - len(template)) // len(piece)
    return template.replace("…", (piece * count).rstrip(",")).encode()


def biases(count: int) -> bytes:
    return json.dumps(chat(logit_bias={str(token): 1 for token in range(count)})).encode()


def too_large(row: int, name: str, body: bytes, headers: dict[str, str] | None = None) -> Case:
    return Case(row, name, body, 413, "request_too_large", headers=headers or {})


def refused(row: int, name: str, body: bytes, param: str, code: str = "invalid_value", path: str = CHAT) -> Case:
    return Case(row, name, body, 400, code, param, path)


HEAVY: list[Case | Flood] = [
    too_large(8, "50 MB by length", raw('{"x": "…"}', "x", 50 * MB)),
    too_large(8, "50 MB chunked", raw('{"x": "…"}', "x", 50 * MB), CHUNKED),
    too_large(8, "16 MB of numbers", raw('{"prompt": […]}', "1,", LIMIT)),
    too_large(8, "16 MB of empty lists", raw('{"prompt": […]}', "[],", LIMIT)),
    too_large(8, "16 MB of messages", raw('{"messages": […]}', USER + ",", LIMIT)),
    refused(
        31,
        "16 MB of one character",
        raw('{"prompt": "…"}', "a", LIMIT),
        "prompt",
        "context_length_exceeded",
        COMPLETIONS,
    ),
    refused(
        31,
        "16 MB of escapes",
        raw('{"prompt": "…"}', "\\u00e9", LIMIT),
        "prompt",
        "context_length_exceeded",
        COMPLETIONS,
    ),
    refused(
        31,
        "a prompt as long as is tokenised",
        json.dumps({"prompt": "a " * 4000}).encode(),
        "prompt",
        "context_length_exceeded",
        COMPLETIONS,
    ),
    refused(
        29,
        "as many ids as allowed",
        raw('{"prompt": […]}', "1,", 2 * (VALUES - 16)),
        "prompt",
        "context_length_exceeded",
        COMPLETIONS,
    ),
    refused(
        29,
        "as many empty lists as allowed",
        raw('{"prompt": […]}', "[],", 3 * (VALUES // 2 - 16)),
        "prompt",
        path=COMPLETIONS,
    ),
    refused(
        22,
        "as many values in messages as allowed",
        raw('{"messages": […]}', USER + ",", len(USER + ",") * (VALUES // 5)),
        "messages",
    ),
    refused(54, "as many biases as allowed in a body", biases(VALUES // 2 - 100), "logit_bias"),
    too_large(54, "a million biases", biases(10**6)),
    Case(5, "16 MB of nested lists", b"[" * (LIMIT - 16), 413, "request_too_large"),
    Case(5, "lists 120000 deep", b'{"a":' + b"[" * 120_000 + b"]" * 120_000 + b"}", 400, "invalid_json"),
    Case(
        9,
        "a bomb of 256 MB",
        gzip.compress(b" " * (256 * MB), 1),
        415,
        "unsupported_media_type",
        headers={"Content-Encoding": "gzip"},
    ),
    Case(
        35, "template variables at their bound", chat(chat_template_kwargs={"x": ["y" * 1000] * 15}, max_tokens=1), 200
    ),
    Case(
        52,
        "stop strings at their bounds",
        chat(stop=["(a+)+$" + "x" * 1000 + str(i) for i in range(16)], max_tokens=32),
        200,
    ),
    Case(48, "as many choices as allowed", chat(n=64, max_tokens=4), 200),
    Flood(13, "200 heads that never end", 200, f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nX-Slow: ", "a"),
    Flood(
        8,
        "200 bodies that never end",
        200,
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY\r\nContent-Length: 100000\r\n\r\n",
        " ",
    ),
    Flood(12, "500 connections that say nothing", 500, "", ""),
]
