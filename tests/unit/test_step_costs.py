"""The benchmark of a token's processor time: which thread is whose, and what the engine's thread is divided into."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import psutil
import pytest

from benchmarks.step_costs import ENGINE, LOOP, MODEL, OTHER, Served, divided, part_of, role_of, table


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["/v/bin/python", "-m", "services.cli", "decode", "smollm2"], "decode"),
        (["/v/bin/python", "-m", "services.cli", "prefill"], "prefill"),
        (["/v/bin/python", "-m", "services.cli", "gateway"], "gateway"),
        (["/opt/binaries/valkey-server", "/tmp/conf"], "bus"),
        (["/v/bin/python", "-m", "services.cli", "serve", "smollm2"], "serve"),
        (["/bin/sh", "-c", "read", "sh"], "serve"),
    ],
)
def test_a_process_is_told_by_its_command_line(command: list[str], role: str) -> None:
    assert role_of(command) == role


def test_a_thread_is_told_by_its_name() -> None:
    assert part_of("decode", "python", is_main=True) == LOOP
    assert part_of("decode", "engine", is_main=False) == ENGINE
    assert part_of("decode", "sl-compute", is_main=False) == MODEL
    assert part_of("prefill", "python", is_main=False) == OTHER
    assert part_of("gateway", "python", is_main=True) == part_of("gateway", "python", is_main=False) == "all"


def test_what_the_engine_thread_computed_is_the_models(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stopped = {"event": "engine_stopped", "pid": 7, "thread_s": 4.0, "model_s": 3.0}
    log.write_text(f"decode: ready\n{json.dumps(stopped)}\n{json.dumps({'event': 'worker_ready'})}\n")
    shares = Served("", psutil.Process(), log).engine_shares({7: "decode", 8: "prefill"})
    assert shares == {"decode": 0.75}
    spent = Counter({("decode", ENGINE): 1000, ("decode", MODEL): 500, ("prefill", ENGINE): 9})
    assert divided(spent, shares) == {("decode", ENGINE): 250, ("decode", MODEL): 1250, ("prefill", ENGINE): 9}


def test_the_table_has_a_column_for_each_number_of_streams() -> None:
    run = {"streams": 1, "output_tokens_per_s": 100.4, "outside_the_model": 30.0, "load client": 5.0}
    more = {**run, "streams": 8, "outside_the_model": 20.0, "core_us_per_token": {"bus: all": 20.0}}
    assert table([{**run, "core_us_per_token": {"bus: all": 29.6, "serve: all": 0.4}}, more]).splitlines() == [
        "| core-µs per output token | 1 streams | 8 streams |",
        "| --- | --- | --- |",
        "| bus: all | 30 | 20 |",
        "| serve: all | 0 | 0 |",
        "| **outside the model** | 30 | 20 |",
        "| load client | 5 | 5 |",
        "| output tokens per second | 100 | 100 |",
    ]
