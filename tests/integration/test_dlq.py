"""`slipstream dlq`: what is shown of requests in quarantine, and that they can be forgotten."""

from __future__ import annotations

import json
from typing import Any

import pytest
from redis.asyncio import Redis

from services.cli.dlq import run_dlq
from shared.bus.deadletters import dead_letters
from shared.config import Settings, load_settings
from shared.errors import ConfigurationError
from shared.protocol.keys import Keys
from tests.integration.bus_helpers import Bench


@pytest.fixture
def bench(redis_client: Redis, keys: Keys) -> Bench:
    return Bench.of(redis_client, keys)


@pytest.fixture
def settings(redis_url: str, deployment: str) -> Settings:
    return load_settings(deployment=deployment, redis={"url": redis_url})


async def quarantine(bench: Bench, request_id: str, prefill_stream: str = "") -> None:
    stream = prefill_stream or bench.prefill
    await bench.store.submit(bench.job(request_id, prompt_ids=(81, 82, 83), prefill_stream=stream))
    for _ in range(2):
        stream, entry = await bench.read(stream)
        await bench.store.begin(stream, entry, request_id, "p")
        await bench.store.sweep(stream, entry, request_id, counted=True)


async def test_the_model_is_named_whichever_stream_it_was_on(
    bench: Bench, keys: Keys, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    await quarantine(bench, "first", keys.express_work("prefill", "m"))
    await run_dlq(settings, "list", as_json=True)
    assert [letter["model"] for letter in json.loads(capsys.readouterr().out)] == ["m"]


async def test_it_lists_oldest_first_and_clears(
    bench: Bench, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    await quarantine(bench, "first")
    await quarantine(bench, "second")
    assert await run_dlq(settings, "list", as_json=True) == 0
    letters: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [letter["id"] for letter in letters] == ["first", "second"]
    assert letters[0] | {"time": 0} == {
        "id": "first",
        "reason": "request_quarantined",
        "deaths": 2,
        "kills": 2,
        "epoch": 4,
        "model": "m",
        "role": "prefill",
        "prompt": 3,
        "tokens": 0,
        "time": 0,
        "gateway": "g",
    }
    await run_dlq(settings, "list", as_json=False)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[2:8] for row in rows[1:]] == [
        [name, "m", "prefill", "2", "of", "2"] for name in ("first", "second")
    ]
    assert await run_dlq(settings, "clear", as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"cleared": 2}
    await run_dlq(settings, "list", as_json=False)
    assert "No request is in quarantine." in capsys.readouterr().out


async def test_a_note_of_another_release_is_shown_as_far_as_it_goes(bench: Bench, keys: Keys) -> None:
    await bench.client.xadd(keys.dead, {"id": "old", "reason": "x", "deaths": "three", "prompt": "-1"})
    (letter,) = await dead_letters(bench.client, keys)
    assert (letter.id, letter.reason, letter.deaths, letter.prompt, letter.time) == ("old", "x", 0, 0, 0)


async def test_without_a_bus_it_says_what_to_set(deployment: str) -> None:
    with pytest.raises(ConfigurationError, match="--redis-url"):
        await run_dlq(load_settings(deployment=deployment), "list", as_json=True)
