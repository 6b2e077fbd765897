"""A gateway on a free port with a fake worker behind it, and the few calls that tests make."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from services.gateway.app import serve
from services.gateway.gateway import Gateway
from services.gateway.model import LoadedModel
from services.gateway.params import SamplingDefaults
from shared.bus.stream import RequestStreams
from shared.config import Settings, load_settings
from shared.protocol.keys import Keys
from shared.protocol.messages import Job
from shared.tasks import end_tasks
from shared.tokenizer.codec import TextCodec
from shared.tokenizer.template import ChatTemplate, TemplateSource
from tests.fake_worker import FakeWorker
from tests.text_models import CHATML, byte_level_tokenizer

MODEL = "tiny"
CONTEXT = 256
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]


def make_codec() -> TextCodec:
    tokenizer = byte_level_tokenizer()
    eos = tokenizer.token_to_id("<|im_end|>")
    assert eos is not None
    codec = TextCodec(tokenizer, eos_ids=[eos])
    codec.set_template(ChatTemplate(TemplateSource(CHATML), codec.control_tokens))
    return codec


CODEC = make_codec()
EOS = CODEC.eos_ids[0]


def make_model(**changes: Any) -> LoadedModel:
    fields: dict[str, Any] = {
        **{"name": MODEL, "codec": CODEC, "vocab_size": CODEC.vocab_size, "max_model_len": CONTEXT},
        "defaults": SamplingDefaults(),
    }
    return LoadedModel(**fields | changes)


def says(text: str) -> Callable[[Job, int], Sequence[int]]:
    """An answer: the text's tokens, then end of sequence."""
    ids = [*CODEC.encode(text), EOS]
    return lambda _job, _choice: ids


@dataclass
class Rig:
    """One gateway, its worker, and a client session on it."""

    gateway: Gateway
    url: str
    worker: FakeWorker
    session: aiohttp.ClientSession

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any, aiohttp.ClientResponse]:
        """Status, decoded body and response of a POST; bytes go out as they are."""
        data = io.BytesIO(body) if isinstance(body, bytes) else json.dumps(body)
        async with self.session.post(self.url + path, data=data, **options) as response:
            text = await response.text()
            return response.status, json.loads(text), response

    async def get(self, path: str, **options: Any) -> tuple[int, Any, aiohttp.ClientResponse]:
        async with self.session.get(self.url + path, **options) as response:
            return response.status, await response.json(content_type=None), response

    async def stream(self, path: str, body: dict[str, Any]) -> tuple[list[str], list[Any]]:
        """(ids, data) of every event of a stream; the final [DONE] is the string."""
        async with self.session.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            return read_events(await response.text())

    async def resume(self, response_id: str, after: str = "", **options: Any) -> tuple[list[str], list[Any]]:
        """(ids, data) of the rest of a stream."""
        headers = {"Last-Event-ID": after} if after else {}
        async with self.session.get(f"{self.url}/v1/streams/{response_id}", headers=headers, **options) as response:
            assert response.status == 200, await response.text()
            return read_events(await response.text())

    async def die(self) -> None:
        """As after SIGKILL: nothing is sent to Redis any more, and the heartbeat is gone (as when its time is over)."""
        streams, cluster = self.gateway.streams, self.gateway.cluster
        assert isinstance(streams, RequestStreams)
        await end_tasks([*streams._loops.tasks, *streams._loops.recoveries])
        streams._loops.tasks.clear()
        cluster._registry.beat_gateway = _silent  # type: ignore[method-assign]
        await cluster._registry.leave_gateway(cluster._gateway_id)

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value, 0 when there is none."""
        return self.gateway.metrics.registry.get_sample_value(f"slipstream_{name}", labels) or 0.0


def read_events(text: str) -> tuple[list[str], list[Any]]:
    ids, data = [], []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in lines:
            ids.append(lines.get("id", ""))
            data.append(lines["data"] if lines["data"] == "[DONE]" else json.loads(lines["data"]))
    return ids, data


@asynccontextmanager
async def rig(
    redis_url: str,
    deployment: str,
    answer: Callable[[Job, int], Sequence[int]] | None = None,
    *,
    model: LoadedModel | None = None,
    max_request_tokens: int = 4096,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """Everything up and ready. `settings` are overrides as for `load_settings`."""
    loaded = make_settings(redis_url, deployment, **settings)
    keys = Keys(deployment)
    async with (
        FakeWorker(redis_url, keys, MODEL, answer or says("Hello there!"), max_request_tokens) as worker,
        serve(loaded, model or make_model()) as (gateway, url),
        aiohttp.ClientSession() as session,
    ):
        yield Rig(gateway, url, worker, session)


async def _silent(gateway_id: str) -> None:
    """A heartbeat that does not reach Redis."""


@asynccontextmanager
async def pair(
    redis_url: str,
    deployment: str,
    answer: Callable[[Job, int], Sequence[int]] | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[Rig, Rig]]:
    """Two gateways of one deployment and the worker they share; each has a client session of its own."""
    async with rig(redis_url, deployment, answer, **settings) as first:
        loaded = make_settings(redis_url, deployment, **settings)
        async with serve(loaded, make_model()) as (gateway, url), aiohttp.ClientSession() as session:
            yield first, Rig(gateway, url, first.worker, session)


def make_settings(redis_url: str, deployment: str, **overrides: Any) -> Settings:
    gateway = {"port": 0, **overrides.pop("gateway", {})}
    redis = {"url": redis_url, "heartbeat_s": 0.1, "heartbeat_ttl_s": 3.0, **overrides.pop("redis", {})}
    return load_settings(deployment=deployment, redis=redis, gateway=gateway, **overrides)


async def eventually(check: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Wait until `check` holds; fails with `what` after the deadline."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"never happened: {what}"
        await asyncio.sleep(0.01)
