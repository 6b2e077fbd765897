"""Wall clocks of two machines are never compared: an hour's difference between processes changes nothing."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest

from tests.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
SHIFTED = Path(__file__).parent / "shifted_clock"
HOUR_S = 3600

WALL_CLOCKS = {"time.time", "time.time_ns", "time.gmtime", "time.localtime", "datetime.now", "datetime.utcnow"}
SHOWN_ONLY = {
    "services/gateway/app.py": "`created` of the model, for clients",
    "services/gateway/prepare.py": "`created` of an answer, for clients",
    "shared/tokenizer/sandbox.py": "today's date in a chat template",
}
"""Files that read the wall clock, and what for. Nothing is decided by it."""


def wall_clock_calls(source: str) -> list[str]:
    """Names of the calls in a file that read the wall clock."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [name for call in calls if (name := ast.unparse(call)) in WALL_CLOCKS]


def test_the_wall_clock_is_read_for_show_only() -> None:
    files = [path for folder in ("services", "shared") for path in (ROOT / folder).rglob("*.py")]
    readers = {str(path.relative_to(ROOT)) for path in files if wall_clock_calls(path.read_text())}
    assert readers == set(SHOWN_ONLY)


def test_the_search_finds_a_wall_clock() -> None:
    assert wall_clock_calls("import time\nage = time.time() - beat.at\n") == ["time.time"]
    assert wall_clock_calls("import time\nage = time.monotonic() - seen\n") == []


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_an_hour_between_the_clocks_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """Gateway and a pair of workers an hour ahead, another pair an hour behind: deadlines hold, deaths are noticed."""
    ahead = {"PYTHONPATH": str(SHIFTED), "CLOCK_SHIFT_S": str(HOUR_S)}
    prompt = [3 + 7 * i % 500 for i in range(80)]
    with Cluster(tmp_path, str(tiny_model), settings=ahead) as cluster:
        first = cluster.complete(prompt, seed=5, max_tokens=24, timeout=30)
        assert first["created"] > time.time() + HOUR_S / 2, "the clock of the gateway is shifted"
        victims = [*cluster.of_role("prefill"), *cluster.of_role("decode")]
        for role in ("prefill", "decode"):
            cluster.start(role, CLOCK_SHIFT_S=str(-HOUR_S))
        cluster.wait_ready(prefill=2, decode=2)
        for victim in victims:
            victim.kill()
        cluster.wait_for(lambda: len(cluster.workers()) == 2, "the deaths to be noticed")
        second = cluster.complete(prompt, seed=5, max_tokens=24, timeout=30)
        assert second["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]
        assert {beat["pid"] for beat in cluster.workers()}.isdisjoint(victim.pid for victim in victims)
