"""SIGKILL of a worker while a client reads: the stream goes on, and nobody could tell from its tokens."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, Process
from tests.inprocess import unsplit_tokens
from tests.tiny_model import VOCAB

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 4242}


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers of each role; small prefill chunks, so that a prompt takes a while."""
    settings = {"SLIPSTREAM_ENGINE__MAX_NUM_BATCHED_TOKENS": "16"}
    folder = tmp_path_factory.mktemp("pair")
    with Cluster(folder, str(tiny_model), prefill=2, decode=2, settings=settings) as cluster:
        yield cluster


class Reader(threading.Thread):
    """Reads one SSE completion; `tokens` grows as chunks arrive."""

    def __init__(self, cluster: Cluster, prompt: list[int], max_tokens: int) -> None:
        super().__init__(daemon=True)
        body = {"model": cluster.model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        body |= {"return_token_ids": True, **SAMPLED}
        headers = {"Content-Type": "application/json"}
        self._request = urllib.request.Request(cluster.url + "/v1/completions", json.dumps(body).encode(), headers)
        self.tokens: list[int] = []
        self.event_ids: list[str] = []
        self.finish_reasons: list[str] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=60) as response:
                for raw in response:
                    self._take(raw.decode().rstrip("\n"))
        except BaseException as error:
            self.error = error

    def _take(self, line: str) -> None:
        if line.startswith("id: "):
            self.event_ids.append(line[4:])
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        for choice in json.loads(line[6:])["choices"]:
            self.tokens += choice.get("token_ids") or []
            if choice["finish_reason"]:
                self.finish_reasons.append(choice["finish_reason"])

    def finished(self) -> Reader:
        self.join(60)
        assert not self.is_alive(), "the stream did not end"
        assert self.error is None, self.error
        return self


def busy_worker(cluster: Cluster, role: str, keep_busy: Callable[[], None] = lambda: None) -> Process:
    """The process of the worker that owns a request now; `keep_busy` is called before each look."""
    found: list[Process] = []

    def look() -> bool:
        keep_busy()
        found[:] = cluster.busy(role)
        return bool(found)

    cluster.wait_for(look, f"a busy {role} worker", 20)
    return found[0]


def test_the_stream_outlives_its_decode_worker(pair: Cluster, tiny_model: Path) -> None:
    prompt = [(5 * i) % (VOCAB - 4) + 3 for i in range(40)]
    expected = unsplit_tokens(tiny_model, [prompt], max_tokens=900, **SAMPLED)[0]
    reader = Reader(pair, prompt, 900)
    pair.wait_for(lambda: len(reader.tokens) > 5, "the first tokens", 20)
    victim = busy_worker(pair, "decode")
    victim.kill()
    at_kill = len(reader.tokens)
    reader.finished()
    assert at_kill < 900, "the worker was killed too late to prove anything"
    assert reader.tokens == expected
    assert reader.finish_reasons == ["length"]
    epochs = [int(event.partition("-")[0]) for event in reader.event_ids]
    assert epochs == sorted(epochs)
    assert epochs[-1] > epochs[0], "the request did not change hands"
    pair.start("decode")
    pair.wait_ready()


def test_the_stream_outlives_its_prefill_worker(pair: Cluster, tiny_model: Path) -> None:
    prompt = [(3 * i + i // 7) % (VOCAB - 4) + 3 for i in range(960)]
    expected = unsplit_tokens(tiny_model, [prompt], max_tokens=20, **SAMPLED)[0]
    victims = pair.of_role("prefill")
    for victim in victims:
        victim.popen.send_signal(19)  # SIGSTOP: whoever claims the request will not get far
    reader = Reader(pair, prompt, 20)
    helper = pair.start("prefill")
    pair.wait_for(lambda: any(beat["pid"] == helper.pid for beat in pair.workers()), "a new prefill worker")
    for victim in victims:
        victim.kill()
    reader.finished()
    assert reader.tokens == expected
    assert reader.finish_reasons == ["length"]
    pair.start("prefill")
    pair.wait_ready()


def test_a_killed_prefill_worker_in_mid_prompt(pair: Cluster, tiny_model: Path) -> None:
    prompts: list[list[int]] = []
    readers: list[Reader] = []

    def keep_busy() -> None:
        """A fast machine is through with a few prompts between two heartbeats."""
        while sum(reader.is_alive() for reader in readers) < 8:
            at = len(prompts)
            prompts.append([(at * 13 + j * 3) % (VOCAB - 4) + 3 for j in range(900 + at % 50)])
            readers.append(Reader(pair, prompts[-1], 10))

    busy_worker(pair, "prefill", keep_busy).kill()
    tokens = [reader.finished().tokens for reader in readers]
    assert tokens == unsplit_tokens(tiny_model, prompts, max_tokens=10, **SAMPLED)
    pair.start("prefill")
    pair.wait_ready()
