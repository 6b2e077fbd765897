"""Short versions of the long proofs: the same code, a few faults."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.faults import aborts, chaos, kills, overload, rolling, soak
from tests.faults.cluster import Topology
from tests.faults.gateway_kills import GATEWAY_KILLS
from tests.faults.schedule import KINDS, make_schedule
from tests.faults.worker_kills import WORKER_KILLS

SMALL = Topology(gateways=2, prefill=2, decode=2, proxied=True)
SHORT: dict[str, Any] = {"num_specs": 8, "concurrency": 6, "standard_s": 1.0}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_workers_die_and_nobody_notices(tmp_path: Path) -> None:
    (one,) = asyncio.run(kills.run_seeds(2, [7], WORKER_KILLS, tmp_path, **SHORT))
    assert len(one["faults"]) == 2
    assert one["violations"] == []
    assert one["failed_requests"] == one["answers_different"] == one["leaked_kv_tokens"] == 0


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_gateways_die_and_their_clients_go_on_elsewhere(tmp_path: Path) -> None:
    (one,) = asyncio.run(kills.run_seeds(3, [7], GATEWAY_KILLS, tmp_path, **SHORT))
    assert one["violations"] == []
    assert one["resumed_streams"] > 0


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_short_random_walk(tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind != "freeze-worker-long"]
    one = asyncio.run(chaos.walk(5, 60.0, kinds, tmp_path, max_steps=3, topology=SMALL, **SHORT))
    assert len(one["faults"]) == 3
    assert one["violations"] == []


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_soak_looks_at_the_memory_of_every_process(tmp_path: Path) -> None:
    one = asyncio.run(soak.soak(60, tmp_path, **SHORT))
    assert one["violations"] == []
    assert sorted(one["memory"]) == ["decode-0", "gateway-0", "prefill-0", "redis"]
    for rows in one["memory"].values():
        assert len(rows) == soak.SHARES
        assert rows[-1]["requests"] >= 60
        assert rows[-1]["kib"] > 1000


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_rolling_restart_fails_nobody(tmp_path: Path) -> None:
    one = asyncio.run(rolling.run(3, 1, tmp_path, **SHORT))
    assert [fault["target"] for fault in one["faults"]] == list(rolling.ORDER)
    assert one["violations"] == []
    assert one["failed_requests"] == one["answers_different"] == one["leaked_kv_tokens"] == 0


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_aborts_at_every_state_give_all_blocks_back(tmp_path: Path) -> None:
    out = tmp_path / "aborts.json"
    assert aborts.main(["--aborts", str(2 * len(aborts.STATES)), "--out", str(out)]) == 0
    (one,) = json.loads(out.read_text())["runs"]
    assert set(one["by_state"]) == set(aborts.STATES)
    assert all(one["by_state"].values())
    assert all(free == one["free_blocks"][0] for free in one["free_blocks"])


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_overload_is_refused_with_advice(tmp_path: Path) -> None:
    """How fast is for the long run on a quiet machine to say; a busy one may look slow, and is offered plenty."""
    one = asyncio.run(overload.run(3.0, 1, tmp_path, least_rate=60.0))
    timing = ("p99", "goodput")
    assert [violation for violation in one["violations"] if not violation.startswith(timing)] == []
    assert one["refused"] > 0
    assert min(one["served_by_key"]) > 0


def test_a_schedule_is_its_seed_and_has_every_kind() -> None:
    steps = make_schedule(list(KINDS), 3, 2 * len(KINDS))
    assert steps == make_schedule(list(KINDS), 3, 2 * len(KINDS))
    assert steps != make_schedule(list(KINDS), 4, 2 * len(KINDS))
    assert {step.kind for step in steps[: len(KINDS)]} == set(KINDS)


def test_the_fault_matrix_names_every_kind_and_no_other() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "reliability.md").read_text()
    rows = [
        line.split("|")[2]
        for line in page.partition("## Fault matrix")[2].partition("\n## ")[0].splitlines()[6:]
        if line
    ]
    assert {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)} == set(KINDS)
