"""Admission on the whole gateway: turns between keys, deadlines, the workers' room, figures that add up."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from services.gateway.drain import drain
from shared.bus.registry import Registry
from shared.protocol.keys import Keys
from tests.gateway_rig import CHAT, COMPLETIONS, MESSAGES, Rig, eventually, rig

BODY = {"messages": MESSAGES, "max_tokens": 4}
GREEDY_WAVES = 15
"""Of ten requests each; what a thousand do is shown without processes in `tests/unit/test_gateway_fairness.py`."""


def with_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def client() -> aiohttp.ClientSession:
    """A session that opens as many connections as it is asked for."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


async def status_of(session: aiohttp.ClientSession, it: Rig, body: dict[str, Any], key: str = "") -> int:
    headers = with_key(key) if key else {}
    async with session.post(it.url + CHAT, json=body, headers=headers) as response:
        await response.read()
        return response.status


def queued(it: Rig, count: int) -> bool:
    return it.gateway.admission.queued == count


async def stop(tasks: list[asyncio.Task[int]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_one_keys_crowd_holds_up_nobody_else(
    redis_url: str, deployment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between asking for a place and starting, another key's request sees hardly more start than was running."""
    bounds = dict.fromkeys(("max_in_flight_per_key", "max_queued", "max_queued_per_key"), 1000)
    async with (
        rig(redis_url, deployment, api_keys="greedy,modest", gateway={"max_in_flight": 2, **bounds}) as it,
        client() as session,
    ):
        it.worker.gate.clear()
        crowd: list[asyncio.Task[int]] = []
        for wave in range(1, GREEDY_WAVES + 1):
            crowd += [asyncio.create_task(status_of(session, it, BODY, "greedy")) for _ in range(10)]
            await eventually(partial(queued, it, 10 * wave - 2), "the crowd waits", 30)
        await eventually(lambda: len(it.worker.jobs) == 2, "two run")
        greedy = it.worker.jobs[0].tenant
        asked: list[int] = []
        slot = it.gateway.admission.slot

        def watched(*args: Any, **how: Any) -> Any:
            asked.append(len(it.worker.jobs))
            return slot(*args, **how)

        monkeypatch.setattr(it.gateway.admission, "slot", watched)
        it.worker.gate.set()
        for _ in range(10):
            assert await status_of(session, it, BODY, "modest") == 200
        started = [number for number, job in enumerate(it.worker.jobs) if job.tenant != greedy]
        await stop(crowd)
    overtaken = [at - before for at, before in zip(started, asked, strict=True)]
    assert max(overtaken) <= 4, "two that were let in before, and those that take their places"


async def test_a_newcomer_passes_a_crowd_that_fills_every_slot(redis_url: str, deployment: str) -> None:
    """Slots and queue are another key's; the newcomer's request is with the workers all the same, and goes first."""
    async with rig(redis_url, deployment, api_keys="greedy,quiet") as it, client() as session:
        it.worker.max_num_seqs = 8
        await it.worker.beat()
        await eventually(lambda: it.gateway.admission.limit == 10, "the bound follows")
        it.worker.gate.clear()
        crowd = [asyncio.create_task(status_of(session, it, BODY, "greedy")) for _ in range(20)]
        await eventually(lambda: queued(it, 10) and len(it.worker.jobs) == 10, "ten run, ten wait")
        quiet = asyncio.create_task(status_of(session, it, BODY, "quiet"))
        await eventually(lambda: len(it.worker.jobs) == 11, "the newcomer runs")
        assert (it.gateway.admission.in_flight, it.gateway.admission.queued) == (11, 10)
        it.worker.gate.set()
        assert await asyncio.gather(quiet, *crowd) == [200] * 21
    keys = Keys(deployment)
    newcomer, others = it.worker.jobs[10], it.worker.jobs[:10] + it.worker.jobs[11:]
    assert newcomer.prefill_stream == keys.express_work("prefill", newcomer.model)
    assert newcomer.decode_stream == keys.express_work("decode", newcomer.model)
    assert newcomer.priority < 0
    assert {(job.prefill_stream, job.priority) for job in others} == {(keys.work("prefill", newcomer.model), 0)}


async def test_a_newcomer_that_put_itself_behind_others_stays_there(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, api_keys="greedy,quiet") as it, client() as session:
        it.worker.gate.clear()
        first = asyncio.create_task(status_of(session, it, BODY, "greedy"))
        await eventually(lambda: len(it.worker.jobs) == 1, "one runs")
        later = asyncio.create_task(status_of(session, it, {**BODY, "priority": 3}, "quiet"))
        await eventually(lambda: len(it.worker.jobs) == 2, "both run")
        it.worker.gate.set()
        assert [await first, await later] == [200, 200]
    job = it.worker.jobs[1]
    assert (job.priority, job.prefill_stream) == (3, Keys(deployment).work("prefill", job.model))


async def test_a_crowd_over_its_bound_is_told_so_and_others_are_not(redis_url: str, deployment: str) -> None:
    settings = {"max_in_flight": 1, "max_queued": 10, "max_queued_per_key": 2}
    async with rig(redis_url, deployment, api_keys="a,b", gateway=settings) as it, client() as session:
        it.worker.gate.clear()
        tasks = [asyncio.create_task(status_of(session, it, BODY, "a")) for _ in range(3)]
        await eventually(lambda: it.gateway.admission.queued == 2, "two wait")
        status, answer, response = await it.post(CHAT, BODY, headers=with_key("a"))
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(response.headers["Retry-After"]) <= 30
        tasks.append(asyncio.create_task(status_of(session, it, BODY, "b")))
        await eventually(lambda: it.gateway.admission.queued == 3, "the other key waits")
        it.worker.gate.set()
        assert await asyncio.gather(*tasks) == [200] * 4


async def test_priority_decides_between_requests_of_one_key(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, gateway={"max_in_flight": 1}) as it, client() as session:
        it.worker.gate.clear()
        tasks: list[asyncio.Task[int]] = []
        for priority in (0, 5, -5):
            body = {**BODY, "priority": priority}
            tasks.append(asyncio.create_task(status_of(session, it, body)))
            await eventually(lambda: bool(it.worker.jobs), "the first runs")
            await eventually(lambda: it.gateway.admission.queued == len(tasks) - 1, "the others wait")
        it.worker.gate.set()
        await asyncio.gather(*tasks)
    assert [job.priority for job in it.worker.jobs] == [0, -5, 5]


async def test_the_bound_follows_workers_and_gateways(redis_url: str, redis_client: Redis, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        assert it.gateway.admission.limit == 256, "a worker that does not say bounds nothing"
        it.worker.max_num_seqs = 8
        await it.worker.beat()
        await eventually(lambda: it.gateway.admission.limit == 10, "the bound follows")
        assert it.metric("admission_limit") == 10
        await Registry(redis_client, Keys(deployment), 60_000).beat_gateway("another")
        await eventually(lambda: it.gateway.admission.limit == 5, "the workers are shared")


async def test_a_requests_own_timeout_ends_its_wait(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, gateway={"max_in_flight": 1}) as it, client() as session:
        it.worker.gate.clear()
        first = asyncio.create_task(status_of(session, it, BODY))
        await eventually(lambda: len(it.worker.jobs) == 1, "one runs")
        status, answer, response = await it.post(CHAT, {**BODY, "timeout": 0.2})
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        assert response.headers["x-should-retry"] == "false"
        assert it.gateway.admission.queued == 0
        it.worker.gate.set()
        assert await first == 200
    assert len(it.worker.jobs) == 1
    assert it.metric("rejections_total", reason="deadline_exceeded") == 1


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_requests_own_timeout_ends_its_work(redis_url: str, deployment: str, path: str) -> None:
    async with rig(redis_url, deployment) as it:
        it.worker.gate.clear()
        body = BODY if path == CHAT else {"prompt": "Hello", "max_tokens": 4}
        status, answer, _ = await it.post(path, {**body, "timeout": 2})  # a cold gateway may take most of a second
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        assert 0 < it.worker.jobs[0].budget_ms <= 2000


async def test_a_timeout_never_lengthens_the_servers_own(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, gateway={"request_timeout_s": 5.0}) as it:
        assert (await it.post(CHAT, {**BODY, "timeout": 100}))[0] == 200
        assert it.worker.jobs[0].budget_ms == 5000


@pytest.mark.parametrize("timeout", [0, -1, "5", True, 90_000])
async def test_a_timeout_that_is_none_is_refused(redis_url: str, deployment: str, timeout: Any) -> None:
    async with rig(redis_url, deployment) as it:
        status, answer, _ = await it.post(CHAT, {**BODY, "timeout": timeout})
    assert (status, answer["error"]["param"]) == (400, "timeout")


async def test_one_log_line_links_the_request_to_its_jobs(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, api_keys="sk-1") as it:
        with capture_logs() as logs:
            headers = {**with_key("sk-1"), "x-request-id": "mine-7"}
            await it.post(COMPLETIONS, {"prompt": ["Hello", "you"], "max_tokens": 2}, headers=headers)
    (line,) = [line for line in logs if line["event"] == "request_submitted"]
    assert (line["request_id"], line["log_level"]) == ("mine-7", "info")
    assert sorted(line["jobs"]) == sorted(job.request_id for job in it.worker.jobs)
    assert line["response_id"].startswith("cmpl-")
    assert "Hello" not in str(line)
    assert "sk-1" not in str(line)


async def test_every_limit_in_force_is_in_the_log_at_start(redis_url: str, deployment: str) -> None:
    with capture_logs() as logs:
        async with rig(redis_url, deployment, gateway={"max_connections": 77}) as it:
            names = {name for name in type(it.gateway.settings).model_fields if name.startswith("max_")}
    (line,) = [line for line in logs if line["event"] == "gateway_limits"]
    assert line["max_connections"] == 77
    assert names | {"header_timeout_s", "admission_limit", "open_files", "num_keys"} <= line.keys()


async def test_a_key_has_a_bound_on_websockets(redis_url: str, deployment: str) -> None:
    settings = {"max_websockets": 3, "max_websockets_per_key": 2}
    async with rig(redis_url, deployment, api_keys="a,b", gateway=settings) as it:

        async def connect(key: str) -> aiohttp.ClientWebSocketResponse:
            return await it.session.ws_connect(it.url + CHAT, headers=with_key(key))

        held = [await connect("a"), await connect("a")]
        for key, status in (("a", 429), ("b", None), ("b", 503)):
            if status is None:
                held.append(await connect(key))
                continue
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await connect(key)
            assert caught.value.status == status
        for socket in held:
            await socket.close()


async def mixed_load(it: Rig, session: aiohttp.ClientSession) -> None:
    """One of every way a request can end; two places, one waiting."""
    changes: list[dict[str, Any]] = [{}, {"stream": True}, {"messages": []}, {"model": "none"}, {"timeout": 0}]
    for body in ({**BODY, **change} for change in changes):
        await status_of(session, it, body, "a")
    async with session.post(it.url + CHAT, data=b"{bad", headers=with_key("a")) as response:
        assert response.status == 400
    it.worker.fail_with = ("internal_error", "boom")
    assert await status_of(session, it, BODY, "a") == 500
    it.worker.fail_with = None
    it.worker.gate.clear()
    tasks = [asyncio.create_task(status_of(session, it, {**BODY, "stream": True}, "a")) for _ in range(2)]
    await eventually(lambda: it.gateway.admission.in_flight == 2, "two run")
    assert await status_of(session, it, {**BODY, "timeout": 0.1}, "a") == 504
    waiting = asyncio.create_task(status_of(session, it, BODY, "a"))
    await eventually(lambda: it.gateway.admission.queued == 1, "one waits")
    assert await status_of(session, it, BODY, "a") == 429
    assert await status_of(session, it, BODY, "b") == 503
    waiting.cancel()
    tasks[0].cancel()
    await eventually(lambda: it.gateway.admission.in_flight == 1, "one left")
    async with session.ws_connect(it.url + CHAT, headers=with_key("b")) as socket:
        await socket.send_json(BODY)
        await eventually(lambda: it.gateway.admission.in_flight == 2, "the socket's runs")
        await socket.send_json({"type": "cancel"})
        await eventually(lambda: it.gateway.admission.in_flight == 1, "and is cancelled")
        await socket.send_json({"messages": [1]})
        await socket.send_json(BODY)
        await eventually(lambda: it.gateway.admission.in_flight == 2, "another runs when the socket closes")
    await eventually(lambda: it.gateway.admission.in_flight == 1, "and is cancelled")
    it.worker.gate.set()
    assert await tasks[1] == 200
    await asyncio.gather(*tasks, waiting, return_exceptions=True)


async def test_at_rest_all_figures_add_up(redis_url: str, deployment: str) -> None:
    settings = {"max_in_flight": 2, "max_queued": 1, "max_in_flight_per_key": 3}
    async with rig(redis_url, deployment, api_keys="a,b", gateway=settings) as it, client() as session:
        await mixed_load(it, session)
        await drain(it.gateway, 1.0)
        assert await status_of(session, it, BODY, "a") == 503
        await eventually(lambda: it.metric("requests_in_flight") == 0, "nothing is left")
        ended = {
            outcome: it.metric("requests_total", route=CHAT, outcome=outcome)
            for outcome in ("finished", "error", "cancelled", "rejected")
        }
        refused = ("invalid_json", "invalid_value", "model_not_found", "rate_limit_exceeded", "overloaded", "draining")
        reasons = {reason: it.metric("rejections_total", reason=reason) for reason in (*refused, "deadline_exceeded")}
    assert it.metric("requests_received_total") == sum(ended.values())
    assert all(ended.values()), ended
    assert all(reasons.values()), reasons
    assert ended["rejected"] == sum(reasons.values())
    assert (it.gateway.admission.in_flight, it.gateway.admission.queued) == (0, 0)
    assert it.metric("admission_wait_seconds_count") == ended["finished"] + ended["error"] + 3
