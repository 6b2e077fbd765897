"""The whole service inside the test's event loop: real workers, a real gateway, and a client session."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from services.gateway.app import serve
from services.gateway.model import load_model
from services.gateway.routes import Gateway
from tests.inprocess import Bench, workers


@dataclass(frozen=True, slots=True)
class Stack:
    """`url` is the gateway's."""

    bench: Bench
    gateway: Gateway
    url: str
    session: aiohttp.ClientSession

    async def post(self, path: str, body: dict[str, Any], **options: Any) -> tuple[int, str]:
        """Status and text of the answer, whatever its form."""
        async with self.session.post(self.url + path, json=body, **options) as response:
            return response.status, await response.text()

    async def get(self, path: str, **options: Any) -> tuple[int, str]:
        async with self.session.get(self.url + path, **options) as response:
            return response.status, await response.text()


@asynccontextmanager
async def stack(
    redis_url: str, deployment: str, model: Path, *, gateway_redis_url: str = "", **settings: Any
) -> AsyncIterator[Stack]:
    """Ready to answer. `gateway_redis_url`: where the gateway has another user on Redis than the workers."""
    async with AsyncExitStack() as opened:
        bench = await opened.enter_async_context(workers(redis_url, deployment, model, **settings))
        redis = bench.settings.redis.model_copy(update={"url": gateway_redis_url or redis_url, "heartbeat_s": 0.1})
        edge = bench.settings.gateway.model_copy(update={"port": 0})
        own = bench.settings.model_copy(update={"redis": redis, "gateway": edge})
        gateway, url = await opened.enter_async_context(serve(own, load_model(own)))
        session = await opened.enter_async_context(aiohttp.ClientSession())
        yield Stack(bench, gateway, url, session)


def text_of_stream(body: str) -> str:
    """The text of an event stream of /v1/completions."""
    chunks = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
