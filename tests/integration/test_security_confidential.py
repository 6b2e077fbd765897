"""What a client says is in its answer and nowhere else: not in a log line, an error, a metric or a note in Redis."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import structlog
from redis.asyncio import Redis

from shared.bus.connection import as_text
from shared.observability.logging import configure_logging
from tests.stack import Stack, stack
from tests.tiny_model import write_tiny_model

CANARY = "canarybird"
API_KEY = "sk-canarybirdkey-0123456789"
AUTH = {"Authorization": f"Bearer {API_KEY}"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": f"say {CANARY}"}], "max_tokens": 4, "seed": 1}
COMPLETION = {"model": "tiny", "prompt": f"say {CANARY}", "max_tokens": 4, "seed": 1}


@pytest.fixture
def logs() -> io.StringIO:
    """Everything that is logged, down to debug, as JSON."""
    out = io.StringIO()
    configure_logging("debug", "json", out)
    logging.getLogger().setLevel(logging.DEBUG)
    return out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Its template refuses a conversation that begins with an assistant, with that message's text."""
    folder = write_tiny_model(tmp_path / "tiny")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    refusal = (
        "{% if messages[0].role == 'assistant' %}{{ raise_exception('not first: ' ~ messages[0].content) }}{% endif %}"
    )
    config["chat_template"] = refusal + config["chat_template"]
    path.write_text(json.dumps(config))
    return folder


BODIES: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/chat/completions", CHAT, 200),
    ("/v1/chat/completions", {**CHAT, "stream": True, "n": 2, "logprobs": True}, 200),
    ("/v1/completions", {**COMPLETION, "stop": [CANARY], "echo": True}, 200),
    ("/v1/completions", {**COMPLETION, "stream": True, "user": CANARY}, 200),
    ("/v1/chat/completions", {**CHAT, "temperature": CANARY}, 400),
    ("/v1/chat/completions", {**CHAT, "stop": [CANARY] * 99}, 400),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": CANARY, "content": CANARY}]}, 400),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": CANARY}]}]}, 400),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "assistant", "content": CANARY}]}, 400),
    ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"messages": CANARY}}, 400),
    ("/v1/completions", {**COMPLETION, "prompt": CANARY * 2000}, 400),
    ("/v1/completions", {**COMPLETION, CANARY: CANARY}, 200),
    ("/tokenize", {"model": "tiny", "prompt": CANARY}, 200),
]


async def all_in_redis(client: Redis, prefix: str) -> dict[str, str]:
    """Every value of a deployment that is kept, as text, by key."""
    found = {}
    async for key in client.scan_iter(match=prefix.replace("{", "\\{") + "*"):
        kind = as_text(await client.type(key))
        reads = {"string": client.get, "hash": client.hgetall, "set": client.smembers}
        value = await (client.xrange(key) if kind == "stream" else reads[kind](key))
        found[as_text(key)] = repr(value)
    return found


async def everything(made: Stack) -> None:
    for path, body, expected in BODIES:
        status, _ = await made.post(path, body, headers=AUTH)
        assert status == expected, (path, body)
    status, text = await made.post("/v1/chat/completions", CHAT, headers={"Authorization": f"Bearer {CANARY}"})
    assert status == 401
    assert CANARY not in text
    status, text = await made.post("/v1/chat/completions", CHAT, headers={**AUTH, "X-Request-Id": "a\tb" + CANARY * 99})
    assert status == 200
    assert (await made.get(f"/v1/models/{CANARY}", headers=AUTH))[0] == 404
    async with made.session.post(
        made.url + "/v1/completions", data=b'{"prompt": "' + CANARY.encode(), headers=AUTH
    ) as bad:
        assert bad.status == 400


async def test_text_and_keys_are_nowhere_but_in_the_answer(
    redis_url: str, redis_client: Redis, deployment: str, model: Path, logs: io.StringIO
) -> None:
    async with stack(redis_url, deployment, model, api_keys=API_KEY) as made:
        await everything(made)
        status, metrics = await made.get("/metrics", headers=AUTH)
        assert status == 200
        kept = await all_in_redis(redis_client, made.bench.keys.prefix)
    written = logs.getvalue()
    assert len(written.splitlines()) > 20, "the log was captured"
    for text in (CANARY, API_KEY):
        assert text not in metrics
        assert [line for line in written.splitlines() if text in line] == []
    assert [key for key, value in kept.items() if API_KEY in value or API_KEY in key] == []


async def test_a_request_that_keeps_failing_leaves_no_text_behind(
    redis_url: str,
    redis_client: Redis,
    deployment: str,
    model: Path,
    logs: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every worker that touches it trips, until it is given up: neither traceback nor note holds what was asked."""
    async with stack(redis_url, deployment, model) as made:

        def trip(*_: object, **__: object) -> object:
            secret = CANARY  # a traceback with local variables would show it
            raise RuntimeError(f"tripped over {len(secret)} characters")

        monkeypatch.setattr("services.prefill.worker.prefill_sequence", trip)
        status, text = await made.post("/v1/completions", COMPLETION)
        assert status == 500
        assert "request_quarantined" in text
        assert CANARY not in text
        dead = await redis_client.xrange(made.bench.keys.dead)
        assert dead
        assert len(dead) == 1
        assert CANARY not in repr(dead)
    assert "tripped over" in logs.getvalue()
    assert [line for line in logs.getvalue().splitlines() if CANARY in line] == []


async def test_the_search_would_find_it(logs: io.StringIO) -> None:
    structlog.get_logger().debug("an_event", field=CANARY)
    assert CANARY in logs.getvalue()


async def test_workers_print_their_limits(redis_url: str, deployment: str, model: Path, logs: io.StringIO) -> None:
    async with stack(redis_url, deployment, model, transfer={"lease_s": 7}):
        pass
    lines = [json.loads(line) for line in logs.getvalue().splitlines() if line.startswith("{")]
    limits = [line for line in lines if line["event"] == "worker_limits"]
    assert len(limits) == 2
    for line in limits:
        assert (line["lease_s"], line["kv_tokens"], line["max_connections"]) == (7, 2048, 128)
        assert line["max_num_seqs"] > 0
        assert line["hang_timeout_s"] > 0
