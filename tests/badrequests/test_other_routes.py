"""Bad requests, rows 72 and 75 to 77: tokenize and detokenize, routes that are not there, paths that climb."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.badrequests.cases import MAX_MESSAGES, NO_TOKEN, Case, check_error, check_refused, parametrize, talk
from tests.gateway_rig import CONTEXT, MESSAGES, Rig

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEMPLATE = "chat_template_kwargs"
TOO_LONG = "context_length_exceeded"


def tokenize(name: str, body: Any, param: str | None, code: str = "invalid_value", status: int = 400) -> Case:
    return Case(72, f"tokenize: {name}", body, status, code, param, "/tokenize")


def detokenize(name: str, tokens: Any, code: str = "invalid_value") -> Case:
    return Case(72, f"detokenize: {name}", {"tokens": tokens}, 400, code, "tokens", "/detokenize")


REFUSED = [
    tokenize("nothing", {}, "prompt"),
    tokenize("two inputs", {"prompt": "a", "messages": MESSAGES}, "prompt"),
    tokenize("a number", {"prompt": 7}, "prompt"),
    tokenize("ids", {"prompt": [1, 2]}, "prompt"),
    tokenize("a flood", {"prompt": "a" * 1_000_000}, "prompt", TOO_LONG),
    tokenize("a bad message", {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    tokenize("too many messages", {"messages": MESSAGES * (MAX_MESSAGES + 1)}, "messages"),
    tokenize("a bad flag", {"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
    tokenize("a reserved variable", {"messages": MESSAGES, "chat_template_kwargs": {"tokenize": 1}}, TEMPLATE),
    tokenize("a bad variable", {"messages": MESSAGES, "chat_template_kwargs": {"__zebra": 1}}, TEMPLATE),
    tokenize("no JSON", b"{bad", None, "invalid_json"),
    *[
        detokenize(f"{ids!r}", ids)
        for ids in (None, "zebra", [1.5], [-1], [True], ["a"], [NO_TOKEN], [2**63], {"a": 1})
    ],
    detokenize("more ids than the context", [1] * (CONTEXT + 1)),
    detokenize("a flood of ids", [1] * 100_000),
    *[
        Case(76, f"{method} {path}", None, 404, "not_found", None, path, method)
        for method in ("GET", "POST")
        for path in ("/admin", "/v1/admin/keys", "/debug", "/start_profile", "/reset_prefix_cache", "/shutdown")
    ],
]

CLIMBING = [
    "/%2e%2e/%2e%2e/etc/passwd",
    "/..%2f..%2fetc/passwd",
    "/../../etc/passwd",
    "//etc/passwd",
    "/static/%00",
    "/live%00",
    "/live/../metrics/nothing",
    "/%ff%fe",
    "/v1/%2e%2e/%2e%2e/nothing",
]


@parametrize(REFUSED)
async def test_refused(it: Rig, case: Case) -> None:
    await check_refused(it, case)


@pytest.mark.parametrize("path", CLIMBING)
async def test_paths_that_climb_lead_nowhere(it: Rig, path: str) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    status, headers, body = await talk(it, head.encode())
    check_error(status, headers, json.loads(body), Case(77, path, None, 404, "not_found"))


async def test_a_model_name_that_climbs(it: Rig) -> None:
    status, headers, body = await talk(
        it, b"GET /v1/models/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    check_error(status, headers, json.loads(body), Case(77, "model", None, 404, "model_not_found", "model"))
