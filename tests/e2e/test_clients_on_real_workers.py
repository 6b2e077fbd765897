"""Clients that stop, leave, misbehave or come too many, on real processes: clear answers, nothing lost, blocks free."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import aiohttp
import pytest

from tests.cluster import Cluster
from tests.tiny_model import CONTEXT

pytestmark = pytest.mark.e2e

PROMPT = [5, 9, 12, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53]


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with two places, none to wait in, and small bodies."""
    settings = {
        "SLIPSTREAM_GATEWAY__MAX_IN_FLIGHT": "2",
        "SLIPSTREAM_GATEWAY__MAX_QUEUED": "1",
        "SLIPSTREAM_GATEWAY__MAX_BODY_BYTES": "20000",
    }
    with Cluster(tmp_path_factory.mktemp("small"), str(tiny_model), settings=settings) as cluster:
        yield cluster


def wait_until_idle(cluster: Cluster) -> None:
    """Until no worker runs, holds or waits for anything: cached blocks are free ones."""

    def idle() -> bool:
        beats = cluster.workers()
        return bool(beats) and all(not (b["running"] or b["waiting"] or b["kv_tokens_used"]) for b in beats)

    cluster.wait_for(idle, "all blocks to be free", 20)


def open_stream(cluster: Cluster, body: dict[str, Any]) -> http.client.HTTPConnection:
    """A connection whose request was sent; the answer is not read yet."""
    address = urlparse(cluster.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {cluster.api_key}"}
    connection.request("POST", "/v1/completions", json.dumps({"model": cluster.model} | body), headers)
    return connection


def test_a_stop_string_cuts_the_text_and_ends_the_work(cluster: Cluster) -> None:
    whole = cluster.complete(PROMPT, max_tokens=300, temperature=0, ignore_eos=True)["choices"][0]
    word = whole["text"][20:24]
    cut = cluster.complete(PROMPT, max_tokens=300, temperature=0, ignore_eos=True, stop=[word])["choices"][0]
    assert cut["finish_reason"] == "stop"
    assert cut["stop_reason"] == word
    assert cut["text"] == whole["text"][: whole["text"].index(word)]
    wait_until_idle(cluster)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_blocks_on_both_sides(cluster: Cluster, stream: bool) -> None:
    body = {"prompt": PROMPT * 3, "max_tokens": 900, "ignore_eos": True, "stream": stream}
    connection = open_stream(cluster, body)
    cluster.wait_for(lambda: bool(cluster.busy("prefill") or cluster.busy("decode")), "the request to run", 20)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_until_idle(cluster)
    assert cluster.complete(PROMPT, max_tokens=3)["choices"][0]["finish_reason"]


async def test_a_websocket_streams_cancels_and_goes_on(cluster: Cluster) -> None:
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    message = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.ws_connect(cluster.url + "/v1/chat/completions") as ws,
    ):
        await ws.send_str("{not json")
        assert (await ws.receive_json(timeout=10))["type"] == "error"
        await ws.send_json(message | {"max_tokens": 900})
        first = await ws.receive_json(timeout=20)
        assert first["object"] == "chat.completion.chunk"
        await ws.send_json({"type": "cancel"})
        assert (await _last(ws))["status"] == "cancelled"
        await ws.send_json(message | {"max_tokens": 5})
        assert (await _last(ws))["status"] == "finished"
    await asyncio.to_thread(wait_until_idle, cluster)


async def _last(ws: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    while True:
        frame: dict[str, Any] = await ws.receive_json(timeout=30)
        if frame.get("type"):
            return frame


BAD_BODIES: list[tuple[bytes, int, str | None]] = [
    (b"{bad", 400, None),
    (b"[]", 400, None),
    (b"", 400, None),
    (b'{"model": "nobody", "prompt": "x"}', 404, "model"),
    (b'{"prompt": "x", "temperature": "hot"}', 400, "temperature"),
    (b'{"prompt": "x", "temperature": 2.1}', 400, "temperature"),
    (b'{"prompt": "x", "top_p": 0}', 400, "top_p"),
    (b'{"prompt": "x", "max_tokens": -1}', 400, "max_tokens"),
    (b'{"prompt": "x", "n": 1000000000}', 400, "n"),
    (b'{"prompt": "x", "seed": 18446744073709551616}', 400, "seed"),
    (b'{"prompt": [1, 99999999]}', 400, "prompt"),
    (b'{"prompt": [[]]}', 400, "prompt"),
    (b'{"prompt": "x", "stream": "yes"}', 400, "stream"),
    (b'{"prompt": "x", "logit_bias": {"a": 1}}', 400, "logit_bias"),
    (b'{"prompt": "x", "temperature": NaN}', 400, None),
]


def refusal(cluster: Cluster, body: bytes, key: str | None = None) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, error object and headers of one raw POST."""
    address = urlparse(cluster.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
    headers = {"Authorization": f"Bearer {cluster.api_key if key is None else key}"}
    connection.request("POST", "/v1/completions", body, headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer["error"], {name.lower(): value for name, value in response.getheaders()}


def test_bad_input_is_refused_and_harms_nobody(cluster: Cluster) -> None:
    pids = sorted(beat["pid"] for beat in cluster.workers())
    canary = cluster.complete(PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]
    for body, status, param in BAD_BODIES:
        got, error, _ = refusal(cluster, body)
        assert (got, error["param"] if param else param) == (status, param), body
        assert error["message"]
        assert error["type"] in ("invalid_request_error", "not_found_error")
    assert cluster.complete(PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"] == canary
    assert sorted(beat["pid"] for beat in cluster.workers()) == pids


def test_an_overlong_prompt_is_refused_with_the_words_agents_look_for(cluster: Cluster) -> None:
    status, error, _ = refusal(cluster, json.dumps({"prompt": [7] * (CONTEXT + 1)}).encode())
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens")


def test_a_wrong_key_is_refused(cluster: Cluster) -> None:
    status, error, headers = refusal(cluster, b'{"prompt": "x"}', key="guess")
    assert (status, error["code"]) == (401, "invalid_api_key")
    assert headers["www-authenticate"].startswith("Bearer")


def test_a_body_over_the_limit_is_refused(small: Cluster) -> None:
    status, error, _ = refusal(small, json.dumps({"prompt": "x" * 30000}).encode())
    assert (status, error["code"]) == (413, "request_too_large")


def test_a_full_queue_sheds_with_retry_after_and_loses_nothing(small: Cluster) -> None:
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(small.complete(PROMPT, max_tokens=500, temperature=0, ignore_eos=True))
        except urllib.error.HTTPError as error:
            with error:
                answers.append((error.code, error.headers["Retry-After"], json.load(error)["error"]["code"]))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    served = [answer for answer in answers if isinstance(answer, dict)]
    refused = [answer for answer in answers if not isinstance(answer, dict)]
    assert len(answers) == 8
    assert len(served) >= 2
    assert refused, "nothing was refused"
    assert all(code in (429, 503) and int(retry_after) >= 1 for code, retry_after, _ in refused)
    assert len({tuple(answer["choices"][0]["token_ids"]) for answer in served}) == 1
    wait_until_idle(small)
