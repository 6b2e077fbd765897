"""Real processes against one engine in this process: the same tokens, greedy and at temperature 1."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.inprocess import unsplit_tokens
from tests.tiny_model import VOCAB

pytestmark = pytest.mark.e2e

GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 97}
PROMPTS = [[(11 * size + 5 * i) % (VOCAB - 4) + 3 for i in range(size)] for size in (1, 3, 16, 33, 120, 600)]
LENGTH = 24


def served(cluster: Cluster, prompt: list[int], **fields: Any) -> tuple[list[int], dict[str, Any]]:
    """Token ids and the path details of one request that runs to its full length."""
    answer = cluster.complete(prompt, max_tokens=LENGTH, ignore_eos=True, **fields)
    return answer["choices"][0]["token_ids"], answer["usage"]["slipstream"]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_split_equals_one_process(cluster: Cluster, tiny_model: Path, params: dict[str, Any]) -> None:
    expected = unsplit_tokens(tiny_model, PROMPTS, max_tokens=LENGTH, **params)
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        got, details = served(cluster, prompt, **params)
        assert got == tokens
        assert details["path"] == "remote_prefill"


def test_alone_equals_in_a_batch_of_16(cluster: Cluster, tiny_model: Path) -> None:
    prompts = [[i + 3, 2 * i + 5, 7, 9 + i] * (i + 1) for i in range(16)]
    expected = unsplit_tokens(tiny_model, prompts, max_tokens=LENGTH, **SAMPLED)
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: served(cluster, prompt, **SAMPLED)[0], prompts))
    assert together == expected


def test_a_prefix_hit_equals_a_miss(cluster: Cluster) -> None:
    prompt = [(i * i) % (VOCAB - 4) + 3 for i in range(77)]
    first, miss = served(cluster, prompt, **SAMPLED)
    second, hit = served(cluster, prompt, **SAMPLED)
    assert second == first
    assert miss["prefill_cached_tokens"] == 0
    assert hit["prefill_cached_tokens"] == 64
    assert hit["kv_bytes"] < miss["kv_bytes"]


def test_tcp_small_chunks_and_preemption_change_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """One cluster that does everything the other way: TCP, chunks of 16, and too few blocks for all at once."""
    prompts = [[(i * 17 + j * 3) % (VOCAB - 4) + 3 for j in range(20 + 5 * i)] for i in range(12)]
    long = {"max_tokens": 250, "ignore_eos": True, **SAMPLED}
    expected = unsplit_tokens(tiny_model, prompts, max_tokens=250, **SAMPLED)
    settings = {
        "SLIPSTREAM_TRANSFER__TRANSPORTS": "tcp",
        "SLIPSTREAM_ENGINE__MAX_NUM_BATCHED_TOKENS": "16",
        "SLIPSTREAM_ENGINE__KV_CACHE_TOKENS": "800",
    }
    with Cluster(tmp_path, str(tiny_model), settings=settings) as cluster, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda prompt: cluster.complete(prompt, **long), prompts))
        details = [answer["usage"]["slipstream"] for answer in answers]
        assert [answer["choices"][0]["token_ids"] for answer in answers] == expected
        assert {detail["transport"] for detail in details} == {"tcp"}
        assert sum(detail["preemptions"] for detail in details) > 0
