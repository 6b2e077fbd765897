"""The tables of the speculation benchmark say what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.raw import write_raw
from benchmarks.speculation import PROMPTS_OF_A_ROUND, Answer, Load, cannot_continue, tables_of
from benchmarks.speculation_prompts import KINDS


def run(kind: str, streams: int, without: float, with_: float, off: float) -> dict[str, Any]:
    cell = {"kind": kind, "streams": streams, "temperature": 1.0}
    return cell | {"without": without, "with": with_, "forbidden": off}


def test_ratios_by_cell_and_over_kinds() -> None:
    runs = [
        *(
            run("chat", 1, 100.0, 200.0, 100.0),
            run("chat", 1, 100.0, 300.0, 100.0),
            run("chat", 1, 100.0, 210.0, 420.0),
        ),
        run("chat", 4, 50.0, 100.0, 50.0),
        run("code", 1, 100.0, 50.0, 100.0),
        run("code", 4, 50.0, 25.0, 50.0),
    ]
    tables = {name: table.splitlines()[2:] for name, table in tables_of(runs).items()}
    assert tables["with"] == [
        "| chat, T = 1 | 2.10 [2.00-3.00], 210 | 2.00 [2.00-2.00], 100 |",
        "| code, T = 1 | 0.50 [0.50-0.50], 50 | 0.50 [0.50-0.50], 25 |",
    ]
    # (2 · 3 · 2.1)^(1/3), (2 · 3 · 2.1 · 0.5)^(1/4); standard errors of the logarithms: 0.221 / √3, 0.790 / 2
    assert tables["with against without"] == [
        "| chat, T = 1 | 2.327 ± 0.297 (3) | 2.000 ± nan (1) |",
        "| code, T = 1 | 0.500 ± nan (1) | 0.500 ± nan (1) |",
        "| all, T = 1 | 1.584 ± 0.626 (4) | 1.000 ± 0.693 (2) |",
    ]
    # (2 · 3 · 0.5 · 0.5)^(1/4), 0.932 / 2
    assert tables["with against forbidden"][2] == "| all, T = 1 | 1.107 ± 0.516 (4) | 1.000 ± 0.693 (2) |"
    # 4.2^(1/3), 4.2^(1/4)
    assert tables["forbidden against without"][0].startswith("| chat, T = 1 | 1.613 ")
    assert tables["forbidden against without"][2].startswith("| all, T = 1 | 1.432 ")


def test_busy_streams_have_tables_of_their_own() -> None:
    runs = [run("chat", 4, 50.0, 40.0, 50.0) | {"busy": {"without": 60.0, "with": 90.0, "forbidden": 60.0}}]
    tables = {name: table.splitlines()[2:] for name, table in tables_of(runs).items()}
    assert tables["with, busy"] == ["| chat, T = 1 | 1.50 [1.50-1.50], 90 |"]
    assert tables["with"] == ["| chat, T = 1 | 0.80 [0.80-0.80], 40 |"]
    assert list(tables_of([*runs, run("chat", 4, 1.0, 1.0, 1.0)])) == [name for name in tables if "busy" not in name]


def test_rounds_are_added_to_a_file_of_this_commit_only(tmp_path: Path) -> None:
    out = tmp_path / "raw.json"
    assert "--out" in cannot_continue(None)
    assert "--out" in cannot_continue(out)
    write_raw(out, [])
    assert not cannot_continue(out)
    out.write_text('{"commit": "of long ago", "runs": []}')
    assert "of long ago" in cannot_continue(out)


def test_streams_are_busy_until_one_has_nothing_left_to_begin() -> None:
    whole = Answer("abcdef", 3, [(1.0, 2), (2.0, 6)])
    late = Answer("abcdefgh", 4, [(1.5, 2), (2.5, 4), (3.5, 8)])
    loaded = Load([whole, late], began=0.0, first_idle=2.0, ended=3.5)
    assert loaded.progress == [(1.0, 1.0), (1.5, 2.0), (2.0, 4.0), (2.5, 5.0), (3.5, 7.0)]
    assert loaded.busy_tokens == 4.0
    assert loaded.speed == pytest.approx(7 / 3.5)
    assert loaded.speed_until(4.0) == pytest.approx(4 / 2.0)
    assert loaded.speed_until(4.5) == pytest.approx(5 / 2.5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_prompts_of_a_round_are_alike(kind: str) -> None:
    assert len({KINDS[kind](index) for index in range(PROMPTS_OF_A_ROUND)}) == PROMPTS_OF_A_ROUND
