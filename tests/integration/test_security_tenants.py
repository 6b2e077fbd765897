"""One API key cannot learn from the prefix cache what another one asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.stack import Stack, stack
from tests.tiny_model import write_tiny_model

PROMPT = "The same long prompt of everybody, far longer than one block of the cache. " * 3
ONE, TWO = "sk-of-the-first-one", "sk-of-the-second-one"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


async def cached(made: Stack, key: str, **more: Any) -> int:
    """Tokens of the prompt that were in the prefix cache, as the client is told."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "seed": 1, **more}
    status, text = await made.post("/v1/completions", body, headers={"Authorization": f"Bearer {key}"})
    assert status == 200, text
    count: int = json.loads(text)["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


async def test_another_key_gets_no_hit(redis_url: str, deployment: str, model: Path) -> None:
    async with stack(redis_url, deployment, model, api_keys=f"{ONE},{TWO}") as made:
        assert await cached(made, ONE) == 0
        own = await cached(made, ONE)
        assert own > 0, "the first key finds its own prompt again"
        assert await cached(made, TWO) == 0
        assert await cached(made, TWO) == own
        assert await cached(made, ONE, cache_salt="a salt of its own") == 0
        assert await cached(made, TWO, cache_salt="a salt of its own") == 0, (
            "a salt is within the key, not instead of it"
        )
        assert await cached(made, ONE, cache_salt="a salt of its own") == own


async def test_the_engines_hold_a_copy_for_each_key(redis_url: str, deployment: str, model: Path) -> None:
    """Timing aside: what is computed for one key is computed again for the other, on both roles."""
    async with stack(redis_url, deployment, model, api_keys=f"{ONE},{TWO}") as made:
        engine = made.bench.prefill[0].engine
        await cached(made, ONE)
        computed = engine.load().computed_tokens
        await cached(made, ONE)
        again = engine.load().computed_tokens - computed
        before = engine.load().computed_tokens
        await cached(made, TWO)
        assert engine.load().computed_tokens - before > again
