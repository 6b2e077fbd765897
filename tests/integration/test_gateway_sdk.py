"""The `openai` package as it comes, against the gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.gateway_rig import CHAT, COMPLETIONS, MODEL, Rig, eventually, rig

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]


def client_of(it: Rig, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=it.url + "/v1", api_key="sk", max_retries=0, **options)


async def test_async_whole_streamed_and_models(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, api_keys="sk") as it, client_of(it) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert whole.choices[0].message.content == "Hello there!"
        assert whole.usage is not None
        assert whole._request_id
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == "Hello there!"
        assert chunks[-1].usage == whole.usage
        completion = await client.completions.create(model=MODEL, prompt="Hello", logprobs=1, max_tokens=3)
        assert completion.choices[0].logprobs is not None
        assert [model.id async for model in client.models.list()] == [MODEL]


async def test_sync_whole_and_streamed(redis_url: str, deployment: str) -> None:
    def talk(url: str) -> tuple[str | None, str]:
        with openai.OpenAI(base_url=url + "/v1", api_key="sk", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=MESSAGES)
            stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        return whole.choices[0].message.content, text

    async with rig(redis_url, deployment) as it:
        assert await asyncio.to_thread(talk, it.url) == ("Hello there!", "Hello there!")


async def test_closing_a_stream_cancels(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it, client_of(it) as client:
        it.worker.gate.clear()
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
        await eventually(lambda: len(it.worker.cancelled) == 1, "the worker is told")


async def test_errors_have_the_sdks_classes(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, api_keys="sk") as it, client_of(it) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="gpt-17", prompt="x")
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        it.worker.roles = []
        await it.worker.beat()
        await eventually(lambda: not it.gateway.cluster.beats, "no worker is left")
        with pytest.raises(openai.InternalServerError) as gone:
            await client.completions.create(model=MODEL, prompt="x")
        assert gone.value.code == "no_workers"
        assert it.metric("rejections_total", reason="no_workers") == 1


async def test_an_error_in_mid_stream_is_raised(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it, client_of(it) as client:
        it.worker.gate.clear()
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)

        async def read_on() -> None:
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    await it.worker.store.cancel(it.worker.jobs[0].request_id, "operator", force=True)

        with pytest.raises(openai.APIError):
            await read_on()


async def test_retries_come_through_a_moment_without_workers(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it, client_of(it) as client:
        it.worker.roles = []
        await it.worker.beat()
        await eventually(lambda: not it.gateway.cluster.beats, "no worker is left")
        asking = asyncio.create_task(client.with_options(max_retries=5).completions.create(model=MODEL, prompt="x"))
        await eventually(lambda: it.metric("rejections_total", reason="no_workers") >= 1, "the first try is refused")
        it.worker.roles = ["prefill", "decode"]
        await it.worker.beat()
        assert (await asking).choices[0].text == "Hello there!"
        assert it.metric("requests_total", route=COMPLETIONS, outcome="finished") == 1
        assert it.metric("requests_total", route=CHAT, outcome="finished") == 0
