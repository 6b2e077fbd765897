"""Streams that outlive their connection and their gateway: every event is a place to go on from, at any gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from services.gateway.drain import drain
from shared.protocol.messages import Job
from tests.gateway_rig import CHAT, CODEC, COMPLETIONS, EOS, MESSAGES, Rig, eventually, pair, read_events, rig

TEXT = "Hello there, where is the ζ of the Hello there"
STREAMS = "/v1/streams/"

BODIES: list[tuple[str, str, dict[str, Any]]] = [
    ("chat", CHAT, {"messages": MESSAGES}),
    ("two choices", CHAT, {"messages": MESSAGES, "n": 2}),
    ("stop string", CHAT, {"messages": MESSAGES, "n": 2, "stop": ["the ζ of"]}),
    ("stop string shown", CHAT, {"messages": MESSAGES, "stop": [" where is"], "include_stop_str_in_output": True}),
    ("log-probabilities", CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1}),
    ("usage", CHAT, {"messages": MESSAGES, "n": 2, "stream_options": {"include_usage": True}}),
    ("token ids", CHAT, {"messages": MESSAGES, "return_token_ids": True, "max_tokens": 9}),
    ("text", COMPLETIONS, {"prompt": "Hello", "max_tokens": 50, "logprobs": 1}),
    ("echo", COMPLETIONS, {"prompt": "Hello", "max_tokens": 7, "echo": True, "n": 2}),
    ("prompts", COMPLETIONS, {"prompt": ["Hello", "where"], "max_tokens": 12, "n": 2}),
]


def answer(job: Job, choice: int) -> list[int]:
    """Choices of unlike length and beginning."""
    return [*CODEC.encode("x" * choice + TEXT)[: 40 - choice], EOS]


def told(events: list[Any]) -> dict[int, dict[str, Any]]:
    """All that a client knows of each choice, however it was cut into events; choice -1 has the usage."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        if event == "[DONE]":
            continue
        assert "error" not in event, event
        if event.get("usage"):
            choices[-1] = event["usage"]
        for choice in event["choices"]:
            known = choices.setdefault(choice["index"], {"text": "", "scores": [], "ids": [], "roles": 0, "end": None})
            delta = choice.get("delta", choice)
            known["text"] += delta.get("content", delta.get("text")) or ""
            known["roles"] += "role" in delta
            known["ids"] += choice.get("token_ids", [])
            scores = choice["logprobs"] or {}
            known["scores"] += scores.get("content") or list(
                zip(scores.get("tokens", []), scores.get("text_offset", []), strict=True)
            )
            assert known["end"] is None, "nothing comes after the end of a choice"
            if choice["finish_reason"] is not None:
                known["end"] = (choice["finish_reason"], choice["stop_reason"])
    return choices


class Reader:
    """A client of one event stream, which may break off at any time."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.response_id = response.headers["x-slipstream-id"]
        self.ids: list[str] = []
        self.events: list[Any] = []

    async def read(self, count: int) -> None:
        """Read until `count` events came."""
        async with asyncio.timeout(10):
            while len(self.events) < count:
                ids, events = read_events((await self.response.content.readuntil(b"\n\n")).decode())
                self.ids += ids
                self.events += events


@asynccontextmanager
async def reading(it: Rig, path: str, body: dict[str, Any], **headers: str) -> AsyncIterator[Reader]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(it.url + path, json={**body, "stream": True}, headers=headers) as response,
    ):
        assert response.status == 200, await response.text()
        yield Reader(response)


@pytest.mark.parametrize(("path", "body"), [body[1:] for body in BODIES], ids=[body[0] for body in BODIES])
async def test_from_every_event_the_rest_is_exactly_what_is_missing(
    redis_url: str, deployment: str, path: str, body: dict[str, Any]
) -> None:
    async with pair(redis_url, deployment, answer) as (first, second):
        ids, events = await first.stream(path, body)
        whole, response_id = told(events), events[0]["id"]
        assert len(ids) > 5
        for got, event_id in enumerate(ids[:-1], 1):
            if not event_id:
                continue  # all but the last of several opening events
            later_ids, later = await second.resume(response_id, event_id)
            assert told([*events[:got], *later]) == whole, event_id
            assert later[-1] == "[DONE]"
            if len(later_ids) > 1 and "," not in event_id:
                assert later_ids == ids[got:], "the same events under the same ids"
        _, again = await second.resume(response_id)
        assert told(again) == whole
        assert len(first.worker.jobs) == (2 if isinstance(body.get("prompt"), list) else 1)


@pytest.mark.parametrize(("path", "body"), [body[1:] for body in BODIES], ids=[body[0] for body in BODIES])
async def test_a_stream_outlives_its_gateway(redis_url: str, deployment: str, path: str, body: dict[str, Any]) -> None:
    async with pair(redis_url, deployment, answer) as (first, second):
        whole = told((await first.stream(path, body))[1])
        first.worker.gate.clear()
        first.worker.pause_at = 6
        async with reading(first, path, body) as reader:
            await reader.read(5)
            await first.die()
        resumed = asyncio.create_task(second.resume(reader.response_id, reader.ids[-1]))
        await eventually(lambda: second.metric("stream_resumes_total", outcome="resumed") == 1, "it is adopted")
        first.worker.gate.set()
        _, later = await resumed
        assert told([*reader.events, *later]) == whole
        assert second.metric("requests_received_total") == 0, "a resume is no new request"
        assert second.gateway.admission.in_flight == 0


async def test_a_resumed_stream_can_be_resumed(redis_url: str, deployment: str) -> None:
    async with pair(redis_url, deployment, answer) as (first, second):
        body = {"prompt": ["Hello", "where"], "max_tokens": 12, "n": 2}
        whole = told((await first.stream(COMPLETIONS, body))[1])
        first.worker.gate.clear()
        first.worker.pause_at = 4
        async with reading(first, COMPLETIONS, body, **{"Idempotency-Key": "k"}) as reader:
            await reader.read(4)
            await first.die()
        async with second.session.get(
            second.url + STREAMS + reader.response_id, params={"starting_after": reader.ids[-1]}
        ) as response:
            assert b"retry: 1000" in await response.content.readuntil(b"\n\n")
            again = Reader(response)
            first.worker.gate.set()
            await again.read(9)
        _, rest = await second.resume(reader.response_id, again.ids[-1])
        assert told([*reader.events, *again.events, *rest]) == whole


async def test_readers_at_two_gateways_get_the_same(redis_url: str, deployment: str) -> None:
    async with pair(redis_url, deployment, answer) as (first, second):
        body = {"messages": MESSAGES, "n": 2}
        first.worker.gate.clear()
        first.worker.pause_at = 3
        async with reading(first, CHAT, body) as reader:
            await reader.read(5)
            other = asyncio.create_task(second.resume(reader.response_id))
            await eventually(lambda: second.metric("stream_resumes_total", outcome="resumed") == 1, "another joins")
            first.worker.gate.set()
            _, events = await other
            rest = read_events((await reader.response.read()).decode())[1]
            assert told([*reader.events, *rest]) == told(events)
        await eventually(lambda: first.metric("requests_total", route=CHAT, outcome="finished") == 1, "it ends")
        assert first.worker.cancelled == []


@pytest.mark.parametrize("dies", [True, False])
async def test_a_reader_is_served_on_when_the_gateway_that_took_the_request_goes(
    redis_url: str, deployment: str, dies: bool
) -> None:
    """The other gateway dies, or its reader leaves: the request comes back to the one that still has a reader."""
    async with pair(redis_url, deployment, answer) as (first, second):
        first.worker.gate.clear()
        first.worker.pause_at = 3
        async with reading(first, CHAT, {"messages": MESSAGES}) as reader:
            await reader.read(3)
            async with (
                aiohttp.ClientSession() as session,
                session.get(second.url + STREAMS + reader.response_id) as response,
            ):
                await response.content.readuntil(b"}\n\n")
                if dies:
                    await second.die()
            first.worker.gate.set()
            rest = read_events((await reader.response.read()).decode())[1]
        assert told([*reader.events, *rest])[0]["text"] == TEXT
        assert first.worker.cancelled == []


async def test_a_follower_whose_reader_leaves_cancels_nothing(redis_url: str, deployment: str) -> None:
    async with pair(redis_url, deployment, answer) as (first, second):
        first.worker.gate.clear()
        async with reading(first, CHAT, {"messages": MESSAGES}) as reader:
            await reader.read(2)
            other = asyncio.create_task(second.resume(reader.response_id))
            await eventually(lambda: second.metric("stream_resumes_total", outcome="resumed") == 1, "another joins")
            handles = first.gateway.streams._handles  # type: ignore[attr-defined]
            await eventually(lambda: all(handle.is_follower for handle in handles.values()), "it follows")
        await eventually(lambda: not handles, "it is dropped")
        first.worker.gate.set()
        _, events = await other
        assert told(events)[0]["text"] == TEXT
        assert first.worker.cancelled == []


async def test_what_cannot_be_resumed_says_why(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, answer) as it:
        _, events = await it.stream(CHAT, {"messages": MESSAGES})
        response_id = events[0]["id"]
        for after in ("x", "2", "-1", "1-2-3", "2-1.0", "2-01", "2-1\uff11", "9" * 20 + "-1", "2-1,2-1", "0-0," * 2000):
            status, body, _ = await it.get(STREAMS + response_id, params={"starting_after": after})
            error = body["error"]
            assert (status, error["code"], error["param"]) == (400, "invalid_value", "starting_after"), after
        status, body, _ = await it.get(STREAMS + response_id, headers={"Last-Event-ID": "99-1"})
        assert (status, body["error"]["param"]) == (400, "Last-Event-ID")
        status, body, response = await it.get(STREAMS + response_id, params={"starting_after": "1-7"})
        assert (status, body["error"]["code"]) == (409, "resume_position_lost")
        assert response.headers["x-should-retry"] == "false"
        for unknown in ("chatcmpl-0", "a" * 100, "%00", "..%2F"):
            status, body, _ = await it.get(STREAMS + unknown)
            assert (status, body["error"]["code"]) == (404, "stream_not_found")
        assert it.metric("stream_resumes_total", outcome="lost") == 1
        assert it.metric("stream_resumes_total", outcome="not_found") == 4
        it.gateway.cluster.draining = True
        status, body, _ = await it.get(STREAMS + response_id)
        assert (status, body["error"]["code"]) == (503, "draining")


async def test_a_stream_belongs_to_the_key_that_asked_for_it(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, answer, api_keys="one,two") as it:
        mine, other = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        status, whole, response = await it.post(CHAT, {"messages": MESSAGES}, headers=mine)
        assert (status, response.headers["x-slipstream-id"]) == (200, whole["id"])
        assert (await it.get(STREAMS + whole["id"], headers=other))[0] == 404
        assert (await it.get(STREAMS + whole["id"]))[0] == 401
        async with it.session.delete(it.url + STREAMS + whole["id"], headers=other) as response:
            assert response.status == 404
        async with it.session.get(it.url + STREAMS + whole["id"], headers=mine) as response:
            events = read_events(await response.text())[1]
        assert told(events)[0]["text"] == whole["choices"][0]["message"]["content"] == TEXT


async def test_a_stream_is_gone_when_its_time_is_over(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, answer, gateway={"resume_ttl_s": 0.4}) as it:
        _, events = await it.stream(CHAT, {"messages": MESSAGES})
        path = STREAMS + events[0]["id"]
        async with asyncio.timeout(10):
            status = 200
            while status != 404:
                async with it.session.get(it.url + path) as response:
                    status = response.status
                    await response.read()
        store, keys = it.worker.store, it.worker.store.keys
        left = [key async for key in store._client.scan_iter(match=f"{keys.prefix.replace('[', '')}*")]
        assert not [key for key in left if b":log:" in key or b":req:" in key], "reading it did not bring it back"


async def test_a_position_that_redis_lost_is_refused_and_the_whole_can_be_read(redis_url: str, deployment: str) -> None:
    async with pair(redis_url, deployment, answer) as (first, second):
        first.worker.gate.clear()
        first.worker.pause_at = 5
        async with reading(first, CHAT, {"messages": MESSAGES}) as reader:
            await reader.read(4)
            store, request_id = first.worker.store, first.worker.jobs[0].request_id
            await store._client.delete(store.keys.request(request_id), store.keys.log(request_id))
            await eventually(lambda: first.gateway.streams.counters.resubmits == 1, "it is submitted again")  # type: ignore[attr-defined]
            status, body, _ = await second.get(STREAMS + reader.response_id, headers={"Last-Event-ID": reader.ids[-1]})
            assert (status, body["error"]["code"]) == (409, "resume_position_lost")
            first.worker.gate.set()
            rest = read_events((await reader.response.read()).decode())[1]
            assert told([*reader.events, *rest])[0]["text"] == TEXT
        assert told((await second.resume(reader.response_id))[1])[0]["text"] == TEXT


async def test_a_position_that_redis_lost_is_known_where_it_was_given_out(redis_url: str, deployment: str) -> None:
    """The connection breaks after Redis forgot everything, and the client comes back to the same gateway."""
    async with rig(redis_url, deployment, answer) as it:
        it.worker.gate.clear()
        it.worker.pause_at = 5
        async with reading(it, CHAT, {"messages": MESSAGES}) as reader:
            await reader.read(4)
            store, request_id = it.worker.store, it.worker.jobs[0].request_id
            await store._client.delete(store.keys.request(request_id), store.keys.log(request_id))
            await eventually(lambda: it.gateway.streams.counters.resubmits == 1, "it is submitted again")  # type: ignore[attr-defined]
            it.worker.gate.set()
            _, rest = await it.resume(reader.response_id, after=reader.ids[-1])
            assert told([*reader.events, *rest])[0]["text"] == TEXT


async def test_what_redis_forgot_can_be_joined_and_read_elsewhere_again(redis_url: str, deployment: str) -> None:
    async with pair(redis_url, deployment, answer) as (first, second):
        first.worker.gate.clear()
        first.worker.pause_at = 5
        body, key = {"messages": MESSAGES}, {"Idempotency-Key": "k"}
        async with reading(first, CHAT, body, **key) as reader:
            await reader.read(4)
            client, prefix = first.worker.store._client, first.worker.store.keys.prefix
            lost = [name async for name in client.scan_iter(count=500) if name.startswith(prefix.encode())]
            assert any(b":resp:" in name for name in lost)
            assert any(b":idem:" in name for name in lost)
            await client.delete(*lost)
            await eventually(lambda: first.gateway.streams.counters.resubmits == 1, "it is submitted again")  # type: ignore[attr-defined]
            first.worker.gate.set()
            rest = read_events((await reader.response.read()).decode())[1]
        assert told([*reader.events, *rest])[0]["text"] == TEXT
        assert told((await second.resume(reader.response_id))[1])[0]["text"] == TEXT
        status, joined, response = await second.post(CHAT, body, headers=key)
        assert (status, joined["id"]) == (200, reader.response_id)
        assert response.headers["Idempotent-Replayed"] == "true"


async def test_an_unreadable_key_found_after_redis_forgot_everything_ends_no_stream(
    redis_url: str, deployment: str
) -> None:
    async with rig(redis_url, deployment, answer) as it:
        it.worker.gate.clear()
        it.worker.pause_at = 5
        client, keys = it.worker.store._client, it.worker.store.keys
        with capture_logs() as logs:
            async with reading(it, CHAT, {"messages": MESSAGES}, **{"Idempotency-Key": "k"}) as reader:
                await reader.read(4)
                lost = [name async for name in client.scan_iter(count=500) if name.startswith(keys.prefix.encode())]
                [idempotency] = [name for name in lost if b":idem:" in name]
                async with client.pipeline() as pipe:
                    pipe.delete(*lost)
                    pipe.set(idempotency, b"no claim")
                    await pipe.execute()
                await eventually(lambda: it.gateway.streams.counters.resubmits == 1, "it is submitted again")  # type: ignore[attr-defined]
                it.worker.gate.set()
                rest = read_events((await reader.response.read()).decode())[1]
        assert told([*reader.events, *rest])[0]["text"] == TEXT
        assert told((await it.resume(reader.response_id))[1])[0]["text"] == TEXT
        assert [log["log_level"] for log in logs if log["event"] == "claim_unreadable"] == ["warning"]
        assert await client.get(idempotency) == b"no claim"


async def test_a_stream_can_be_cancelled_at_another_gateway(redis_url: str, deployment: str) -> None:
    async with pair(redis_url, deployment, answer) as (first, second):
        first.worker.gate.clear()
        async with reading(first, CHAT, {"messages": MESSAGES}) as reader:
            await reader.read(2)
            async with second.session.delete(second.url + STREAMS + reader.response_id) as response:
                assert (response.status, (await response.json())["deleted"]) == (200, True)
            events = read_events((await reader.response.read()).decode())[1]
        assert events[-2]["error"]["code"] == "request_cancelled"
        await eventually(lambda: len(first.worker.cancelled) == 1, "the worker is told")


async def test_a_drain_hands_streams_over(redis_url: str, deployment: str) -> None:
    async with pair(redis_url, deployment, answer) as (first, second):
        first.worker.gate.clear()
        first.worker.pause_at = 4
        async with reading(first, CHAT, {"messages": MESSAGES}) as reader:
            await reader.read(3)
            await drain(first.gateway, 0.05)
            ids, events = read_events((await reader.response.read()).decode())
        assert events[-1] == "[DONE]"
        error = events[-2]["error"]
        assert (error["code"], error["retry"]) == ("draining", {"resume": True, "after_ms": 1000})
        reader.events += events[:-2]
        assert error["last_event_id"] == [*reader.ids, *filter(None, ids)][-1]
        resumed = asyncio.create_task(second.resume(reader.response_id, error["last_event_id"]))
        await eventually(lambda: second.metric("stream_resumes_total", outcome="resumed") == 1, "it is adopted")
        first.worker.gate.set()
        assert told([*reader.events, *(await resumed)[1]])[0]["text"] == TEXT
        assert first.worker.cancelled == []
        assert first.metric("requests_in_flight") == 0
        assert first.metric("requests_total", route=CHAT, outcome="error") == 1


async def test_a_socket_goes_on_with_a_stream(redis_url: str, deployment: str) -> None:
    async with pair(redis_url, deployment, answer) as (first, second):
        frames: list[Any] = []
        first.worker.gate.clear()
        first.worker.pause_at = 4
        async with first.session.ws_connect(first.url + CHAT) as socket:
            await socket.send_json({"messages": MESSAGES})
            frames += [await socket.receive_json(timeout=10) for _ in range(3)]
            await first.die()
        async with second.session.ws_connect(second.url + CHAT) as socket:
            await socket.send_json({"type": "resume", "id": frames[0]["id"], "starting_after": 7})
            assert (await socket.receive_json(timeout=10))["error"]["param"] == "starting_after"
            await socket.send_json({"type": "resume"})
            assert (await socket.receive_json(timeout=10))["error"]["param"] == "id"
            await socket.send_json({"type": "resume", "id": frames[0]["id"], "starting_after": frames[-1]["event_id"]})
            first.worker.gate.set()
            while "choices" in (frame := await socket.receive_json(timeout=10)):
                frames.append(frame)
        assert (frame["type"], frame["status"]) == ("done", "finished")
        assert told(frames)[0]["text"] == TEXT
        assert told(frames)[0]["roles"] == 1


async def test_the_error_event_is_json_that_names_the_place(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, answer) as it:
        it.worker.gate.clear()
        it.worker.pause_at = 3
        async with reading(it, CHAT, {"messages": MESSAGES}) as reader:
            await reader.read(3)
            await it.worker.store.cancel(
                it.worker.jobs[0].request_id, "request_quarantined", outcome="error", force=True
            )
            ids, events = read_events((await reader.response.read()).decode())
        error = json.loads(json.dumps(events[-2]))["error"]
        assert (error["code"], error["retry"]["resume"]) == ("request_quarantined", False)
        assert error["last_event_id"] == [*reader.ids, *filter(None, ids)][-1]
