"""The routes that operators and tools use: health, metrics, models, tokenizer, and Redis going away."""

from __future__ import annotations

import re
from typing import Any

import pytest

from services.gateway.app import serve
from shared.bus.embedded import EmbeddedServer
from shared.errors import BusUnavailable
from tests.gateway_rig import CHAT, CODEC, CONTEXT, MESSAGES, MODEL, eventually, make_model, make_settings, rig


async def test_health_tells_what_is_missing(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        status, body, _ = await it.get("/health")
        assert (status, body["status"], body["reasons"]) == (200, "ok", [])
        assert body["workers"] == {"prefill": {"ready": 1, "live": 1}, "decode": {"ready": 1, "live": 1}}
        it.worker.roles = ["decode"]
        await it.worker.beat()
        await eventually(lambda: not it.gateway.cluster.ready("prefill"), "the prefill worker is gone")
        status, body, _ = await it.get("/health")
        assert (status, body["reasons"]) == (503, ["no prefill worker is ready"])
        assert (await it.get("/live"))[0] == 200


async def test_workers_of_another_model_do_not_count(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, model=make_model(name="other")) as it:
        status, body, _ = await it.get("/health")
        assert status == 503
        assert len(body["reasons"]) == 2


async def test_without_redis_the_gateway_says_so_and_recovers(deployment: str) -> None:
    with EmbeddedServer() as server:
        redis = {"heartbeat_s": 0.05, "heartbeat_ttl_s": 0.4}
        async with rig(server.url, deployment, redis=redis) as it:
            server.pause()
            try:
                await eventually(lambda: not it.gateway.cluster.redis_answers, "the silence is noticed")
                status, body, _ = await it.get("/health")
                assert (status, body["redis"], body["reasons"]) == (503, False, ["Redis does not answer"])
                status, body, response = await it.post(CHAT, {"messages": MESSAGES})
                assert (status, body["error"]["code"]) == (503, "bus_unavailable")
                assert "Retry-After" in response.headers
                assert (await it.get("/v1/models"))[0] == 200
            finally:
                server.resume()
            await eventually(lambda: it.gateway.cluster.reasons() == [], "it is served again")
            assert (await it.post(CHAT, {"messages": MESSAGES}))[0] == 200


async def test_a_gateway_without_redis_does_not_start(deployment: str) -> None:
    with pytest.raises(BusUnavailable):
        async with serve(make_settings("redis://127.0.0.1:1/0", deployment), make_model()):
            pass


async def test_models(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment, model=make_model(name="org/some-model")) as it:
        _, listed, _ = await it.get("/v1/models")
        assert listed["object"] == "list"
        [model] = listed["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == ("org/some-model", "model", CONTEXT)
        assert (await it.get("/v1/models/org/some-model"))[1] == model


async def test_tokenize_and_detokenize_are_inverse(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        _, body, _ = await it.post("/tokenize", {"model": MODEL, "prompt": "Hello, 世界", "return_token_strs": True})
        assert (body["tokens"], body["count"]) == (CODEC.encode("Hello, 世界"), len(body["tokens"]))
        assert body["max_model_len"] == CONTEXT
        assert len(body["token_strs"]) == body["count"]
        _, back, _ = await it.post("/detokenize", {"model": MODEL, "tokens": body["tokens"]})
        assert back == {"prompt": "Hello, 世界"}
        _, chat, _ = await it.post("/tokenize", {"messages": MESSAGES})
        await it.post(CHAT, {"messages": MESSAGES})
        assert tuple(chat["tokens"]) == it.worker.jobs[0].prompt_ids, "what /tokenize shows is what the model gets"
        _, back, _ = await it.post("/detokenize", {"tokens": chat["tokens"]})
        assert back["prompt"].startswith("<|im_start|>user")
        assert (await it.post("/tokenize", {"prompt": ""}))[1]["tokens"] == []


async def test_metrics_are_prometheus_text_and_add_up(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        bodies: list[dict[str, Any]] = [
            {"messages": MESSAGES},
            {"messages": MESSAGES, "stream": True},
            {"messages": []},
        ]
        for body in bodies:
            async with it.session.post(it.url + CHAT, json=body) as response:
                await response.read()
        await eventually(lambda: it.metric("requests_in_flight") == 0, "all ended")
        async with it.session.get(it.url + "/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = await response.text()
    samples = dict(re.findall(r"^(slipstream_\S+) (\S+)$", text, re.MULTILINE))
    assert float(samples["slipstream_requests_received_total"]) == 3
    ends = [float(value) for name, value in samples.items() if name.startswith("slipstream_requests_total")]
    assert sum(ends) == 3
    assert float(samples['slipstream_request_paths_total{path="remote_prefill",reason=""}']) == 2
    assert float(samples['slipstream_kv_transfer_bytes_total{transport="shm"}']) == 8192
    assert float(samples['slipstream_prefix_cached_tokens_total{role="prefill"}']) == 4
    assert float(samples["slipstream_generation_tokens_total"]) == 2 * (len(CODEC.encode("Hello there!")) + 1)
    assert float(samples['slipstream_worker_kv_tokens{role="decode",worker="fake-decode"}']) == 4096
    assert float(samples['slipstream_workers{role="prefill",state="ready"}']) == 1
    assert "slipstream_resubmits_total" in samples
    assert float(samples["slipstream_time_to_first_token_seconds_count"]) == 2
    assert f'slipstream_http_responses_total{{route="{CHAT}",status="400"}}' in samples
    assert "Hello" not in text


async def test_version_is_the_distributions(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        _, body, _ = await it.get("/version")
    assert set(body) == {"version"}
    assert body["version"]


async def test_no_cors_header_is_sent(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        _, _, response = await it.get("/live", headers={"Origin": "http://evil.example"})
    assert not [name for name in response.headers if name.lower().startswith("access-control")]
