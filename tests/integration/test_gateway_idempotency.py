"""One Idempotency-Key and one body are one generation, whoever asks where and how often."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from shared.bus.stored import Claim, ResponseStore, digest_of
from shared.protocol.keys import Keys
from tests.gateway_rig import CHAT, COMPLETIONS, MESSAGES, Rig, eventually, pair, read_events, rig

BODY: dict[str, Any] = {"messages": MESSAGES}
KEY = {"Idempotency-Key": "order-66"}


def text_of(whole: dict[str, Any]) -> str:
    return str(whole["choices"][0]["message"]["content"])


def streamed_text(events: list[Any]) -> str:
    chunks = [event for event in events if event != "[DONE]" and event["choices"]]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


async def all_ended(it: Rig) -> None:
    await eventually(lambda: it.metric("requests_in_flight") == 0, "all ended")


async def test_a_running_generation_is_joined_at_any_gateway_streamed_or_whole(redis_url: str, deployment: str) -> None:
    async with pair(redis_url, deployment) as (first, second):
        first.worker.gate.clear()
        running = asyncio.create_task(first.post(CHAT, BODY, headers=KEY))
        await eventually(lambda: len(first.worker.jobs) == 1, "it runs")
        whole = asyncio.create_task(second.post(CHAT, BODY, headers=KEY))
        wants_usage = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
        async with first.session.post(first.url + CHAT, json=wants_usage, headers=KEY) as response:
            assert response.headers["Idempotent-Replayed"] == "true"
            await eventually(lambda: second.metric("idempotent_joins_total") == 1, "another joins")
            first.worker.gate.set()
            events = read_events(await response.text())[1]
        status, body, response = await running
        assert (status, text_of(body)) == (200, "Hello there!")
        assert "Idempotent-Replayed" not in response.headers
        status, joined, response = await whole
        assert (status, joined) == (200, body)
        assert response.headers["Idempotent-Replayed"] == "true"
        assert response.headers["x-slipstream-id"] == body["id"]
        assert (streamed_text(events), events[-2]["usage"]) == ("Hello there!", body["usage"])
        assert len(first.worker.jobs) == 1
        for it, received in ((first, 2), (second, 1)):
            await all_ended(it)
            assert it.metric("requests_received_total") == received
            assert it.metric("requests_total", route=CHAT, outcome="finished") == received
            assert it.gateway.admission.in_flight == 0
        assert first.metric("generation_tokens_total") == body["usage"]["completion_tokens"], "counted once"
        assert second.metric("generation_tokens_total") == 0


async def test_a_finished_generation_is_answered_again(redis_url: str, deployment: str) -> None:
    async with pair(redis_url, deployment) as (first, second):
        _, body, _ = await first.post(CHAT, BODY, headers=KEY)
        for it in (first, second):
            status, again, response = await it.post(CHAT, BODY, headers=KEY)
            assert (status, again, response.headers["Idempotent-Replayed"]) == (200, body, "true")
        assert len(first.worker.jobs) == 1
        assert (await first.post(CHAT, BODY))[1]["id"] != body["id"], "without a key it is another one"


async def test_two_at_the_same_moment_are_one(redis_url: str, deployment: str) -> None:
    async with pair(redis_url, deployment) as (first, second):
        answers = await asyncio.gather(*(it.post(CHAT, BODY, headers=KEY) for it in (first, second) * 4))
        assert {status for status, _, _ in answers} == {200}
        assert len({body["id"] for _, body, _ in answers}) == 1
        assert sum("Idempotent-Replayed" not in response.headers for _, _, response in answers) == 1
        assert len(first.worker.jobs) == 1


async def test_another_body_is_refused_and_another_client_is_another_key(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, api_keys="one,two") as it:
        one, two = ({**KEY, "Authorization": f"Bearer {key}"} for key in ("one", "two"))
        _, first, _ = await it.post(CHAT, BODY, headers=one)
        for path, body in (
            (CHAT, {**BODY, "temperature": 0.5}),
            (CHAT, {**BODY, "n": 2}),
            (COMPLETIONS, {"prompt": "Hello"}),
        ):
            status, answer, _ = await it.post(path, body, headers=one)
            assert (status, answer["error"]["code"]) == (422, "idempotency_key_reused")
            assert answer["error"]["param"] == "Idempotency-Key"
        status, second, _ = await it.post(CHAT, {**BODY, "n": 2}, headers=two)
        assert status == 200
        assert first["id"] != second["id"]
        assert len(it.worker.jobs) == 2


@pytest.mark.parametrize("key", ["", " ", "a b", "ä", "x" * 256, "a\tb"])
async def test_a_key_that_is_none_is_refused(redis_url: str, deployment: str, key: str) -> None:
    async with rig(redis_url, deployment) as it:
        status, body, _ = await it.post(CHAT, BODY, headers={"Idempotency-Key": key})
        error = body["error"]
        assert (status, error["code"], error["param"]) == (400, "invalid_value", "Idempotency-Key")
        assert it.worker.jobs == []


async def test_an_error_is_answered_again_as_the_error(redis_url: str, deployment: str) -> None:
    async with pair(redis_url, deployment) as (first, second):
        first.worker.fail_with = ("engine_error", "it broke")
        _, body, _ = await first.post(CHAT, BODY, headers=KEY)
        first.worker.fail_with = None
        status, again, _ = await second.post(CHAT, BODY, headers=KEY)
        assert (status, again) == (500, body)
        assert again["error"]["code"] == "engine_error"
        assert len(first.worker.jobs) == 1


async def test_a_refused_request_leaves_its_key_free(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        assert (await it.post(CHAT, {**BODY, "max_tokens": 10_000}, headers=KEY))[0] == 400
        assert (await it.post(CHAT, BODY, headers=KEY))[0] == 200


async def test_it_goes_on_for_a_while_without_its_client_and_is_then_cancelled(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, gateway={"resume_grace_s": 0.5}) as it:
        it.worker.gate.clear()
        await leave_early(it)
        joined = asyncio.create_task(it.post(CHAT, BODY, headers=KEY))
        await eventually(lambda: it.metric("idempotent_joins_total") == 1, "the client is back in time")
        it.worker.gate.set()
        assert text_of((await joined)[1]) == "Hello there!"
        assert it.worker.cancelled == []


async def test_without_readers_it_is_cancelled_and_started_again_when_asked_for(
    redis_url: str, deployment: str
) -> None:
    async with rig(redis_url, deployment, gateway={"resume_grace_s": 0.1}) as it:
        it.worker.gate.clear()
        await leave_early(it)
        await eventually(lambda: len(it.worker.cancelled) == 1, "nobody came back")
        it.worker.gate.set()
        status, body, response = await it.post(CHAT, BODY, headers=KEY)
        assert (status, text_of(body)) == (200, "Hello there!")
        assert "Idempotent-Replayed" not in response.headers
        assert len(it.worker.jobs) == 2


async def leave_early(it: Rig) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(it.url + CHAT, json={**BODY, "stream": True}, headers=KEY) as response,
    ):
        await response.content.readuntil(b"\n\n")
    await eventually(lambda: it.metric("requests_in_flight") == 0, "the client left")
    assert it.worker.cancelled == []


@pytest.mark.parametrize("age_s", [100, 4])
async def test_a_key_whose_gateway_died_before_it_submitted_is_taken_over(
    redis_url: str, deployment: str, age_s: int
) -> None:
    async with rig(redis_url, deployment) as it:
        _, body, _ = await it.post(CHAT, BODY, headers=KEY)
        store = ResponseStore(it.worker.store._client, Keys(deployment))
        digest = digest_of("", KEY["Idempotency-Key"])
        held = await store.look(digest)
        assert held is not None
        lost = Claim("chatcmpl-lost", held.claim.fingerprint, held.claim.ttl_ms)
        assert await store.claim(digest, lost, held) is None
        await it.worker.store._client.pexpire(Keys(deployment).idempotency(digest), lost.ttl_ms - 1000 * age_s)
        status, again, _ = await it.post(CHAT, BODY, headers=KEY)
        assert (status, text_of(again)) == (200, "Hello there!")
        assert again["id"] not in (body["id"], "chatcmpl-lost")
        assert (await it.post(CHAT, BODY, headers=KEY))[1] == again
