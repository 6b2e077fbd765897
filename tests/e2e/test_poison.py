"""A request that kills every worker that runs it: two workers die, its neighbours do not notice, it is put away."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.e2e.poisoned import POISON

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(180)]

NUM_WORKERS = 3
PROMPTS = [[3 + (7 * i + 13 * seed) % 400 for i in range(40)] for seed in range(6)]


def answer(cluster: Cluster, prompt: list[int]) -> list[int]:
    sampling = {"ignore_eos": True, "seed": 3, "temperature": 0.8, "logit_bias": {str(POISON): -100}}
    tokens: list[int] = cluster.complete(prompt, max_tokens=150, **sampling)["choices"][0]["token_ids"]
    return tokens


def refusal(cluster: Cluster) -> tuple[int, dict[str, Any], str]:
    """Status, error and advice that the poisonous request gets."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        cluster.complete([*PROMPTS[0], POISON], max_tokens=20)
    with caught.value as error:
        return error.code, json.load(error)["error"], error.headers["x-should-retry"]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_guilty_one_of_a_batch_is_put_away(role: str, tiny_model: Path, tmp_path: Path) -> None:
    counts = {"prefill": 1, "decode": 1} | {role: NUM_WORKERS}
    prefill, decode = counts["prefill"], counts["decode"]
    settings = {"POISONED_ROLE": role, "SLIPSTREAM_REDIS__HEARTBEAT_TTL_S": "2"}
    module = "tests.e2e.poisoned"
    with Cluster(tmp_path, str(tiny_model), prefill, decode, settings=settings, module=module) as cluster:
        with ThreadPoolExecutor(len(PROMPTS) + 1) as pool:
            expected = list(pool.map(lambda prompt: answer(cluster, prompt), PROMPTS))
            neighbours = [pool.submit(answer, cluster, prompt) for prompt in PROMPTS]
            status, error, retry = pool.submit(refusal, cluster).result()
            assert [neighbour.result() for neighbour in neighbours] == expected
        assert (status, error["code"], retry) == (500, "request_quarantined", "false")
        died = [process for process in cluster.processes if process.popen.poll() == -9]
        assert [process.role for process in died] == [role, role]
        dead = subprocess.run(
            [sys.executable, "-m", "services.cli", "dlq", "list", "--json", "--redis-url", cluster.redis_url],
            capture_output=True,
            text=True,
            check=True,
        )
        (note,) = json.loads(dead.stdout)
        assert (note["reason"], note["role"], int(note["deaths"])) == ("request_quarantined", role, 2)
        assert note["prompt"] == len(PROMPTS[0]) + 1, "its length, and nothing of its contents"
