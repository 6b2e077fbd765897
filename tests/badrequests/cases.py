"""One bad request of the tables, how it is sent, and what every refusal has to look like.

While each bad request is handled a small normal one (the canary) runs beside it and has to be answered, and no bad
request may reach a worker.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from services.gateway.fields import MEDIA_PARTS, RESERVED_TEMPLATE_KWARGS, STREAM_OPTIONS
from services.gateway.schemas import IGNORED, UNSUPPORTED, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tests.gateway_rig import CHAT, CODEC, COMPLETIONS, MESSAGES, MODEL, Rig

TYPES = {
    **{400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"},
    **{405: "invalid_request_error", 408: "invalid_request_error", 413: "invalid_request_error"},
    **{415: "invalid_request_error", 429: "rate_limit_error", 503: "server_error"},
}
CANARY = {"prompt": "canary", "max_tokens": 2}
MAX_MESSAGE_CHARS = 500
DEADLINE_S = 30.0
MAX_PROMPTS = 4
MAX_MESSAGES = 4096
NO_TOKEN = 1 << 20
"""An id that no vocabulary here has."""

_OUR_WORDS = frozenset().union(
    *(kind.model_fields for kind in (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)),
    *(UNSUPPORTED, IGNORED, STREAM_OPTIONS, MEDIA_PARTS, RESERVED_TEMPLATE_KWARGS),
    (MODEL, "role", "content", "type", "text", "tool_calls", "tool_call_id"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """`row` is a key of ROWS; a `body` of bytes goes out as it is, anything else as JSON."""

    row: int
    name: str
    body: Any = None
    status: int = 400
    code: str = "invalid_value"
    param: str | None = None
    path: str = CHAT
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Hello", **fields}


def each_value(row: int, param: str, values: Iterable[Any], code: str = "invalid_value") -> list[Case]:
    """A case for every value of one field, on both completions."""
    cases = []
    for value in values:
        name = f"{param}={_shown(value)}"
        cases.append(Case(row, f"{name} in chat", chat(**{param: value}), 400, code, param))
        cases.append(Case(row, f"{name} in text", completion(**{param: value}), 400, code, param, COMPLETIONS))
    return cases


def parametrize(cases: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.row}: {case.name}") for case in cases])


async def check_refused(it: Rig, case: Case) -> None:
    """The case is refused as its row says, the canary beside it is served, and no worker sees more."""
    async with asyncio.timeout(DEADLINE_S):
        (status, headers, text), served = await asyncio.gather(_send(it, case), it.post(COMPLETIONS, CANARY))
    assert served[0] == 200, "the canary"
    check_error(status, headers, json.loads(text), case)
    canary = tuple(CODEC.encode("canary"))
    assert [job.prompt_ids for job in it.worker.jobs if job.prompt_ids != canary] == []


async def check_accepted(it: Rig, case: Case) -> None:
    """What looks bad and is not: answered with 200, and the canary too."""
    async with asyncio.timeout(DEADLINE_S):
        (status, _, text), served = await asyncio.gather(_send(it, case), it.post(COMPLETIONS, CANARY))
    it.worker.jobs.clear()
    assert (served[0], status) == (200, 200), text


def check_error(status: int, headers: Mapping[str, str], body: Any, case: Case) -> None:
    """Status, headers and body of a refusal, and that its words are ours."""
    assert set(body) == {"error"}
    error = body["error"]
    assert (status, error["code"], error["param"]) == (case.status, case.code, case.param), error["message"]
    assert headers["Content-Type"].split(";")[0] == "application/json"
    assert headers["x-request-id"]
    check_error_object(error, TYPES[case.status], case.body)


def check_error_object(error: Mapping[str, Any], kind: str, sent: Any) -> None:
    """The four keys of an error; the message is a short sentence without a word of the client's."""
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == kind
    message = error["message"]
    assert message.endswith(".")
    assert len(message) <= MAX_MESSAGE_CHARS
    assert message.isprintable()
    for word in _foreign_words(sent):
        assert word not in message, "the refusal repeats what the client sent"


async def talk(it: Rig, raw: bytes) -> tuple[int, Mapping[str, str], bytes]:
    """Send bytes, read the one answer up to the end of the connection: status, headers, body."""
    host, port = it.url.removeprefix("http://").split(":")
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(raw)
            answer = await reader.read()
        finally:
            writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


def as_bytes(body: Any) -> bytes:
    return body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()


def _foreign_words(value: Any, depth: int = 0) -> Iterator[str]:
    """The client's own texts and names, where they are long enough to be told from ours."""
    if isinstance(value, str) and len(value) > 4 and value not in _OUR_WORDS:
        yield value[:64]
    elif isinstance(value, dict) and depth < 8:
        for name, inner in value.items():
            yield from _foreign_words(name)
            yield from _foreign_words(inner, depth + 1)
    elif isinstance(value, list) and depth < 8:
        for inner in value[:8]:
            yield from _foreign_words(inner, depth + 1)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 32 else f"{text[:12]}… ({len(text)} characters)"


async def _send(it: Rig, case: Case) -> tuple[int, Mapping[str, str], str]:
    data = None if case.body is None else io.BytesIO(as_bytes(case.body))
    headers = {"Content-Type": "application/json", **case.headers}
    async with it.session.request(case.method, it.url + case.path, data=data, headers=headers) as response:
        return response.status, response.headers, await response.text()
