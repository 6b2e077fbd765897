"""The tables of the speculation benchmark say what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.speculation import PROMPTS_OF_A_ROUND, Answer, Load, tables_of, weak_cells
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
    assert tables["forbidden"][0] == "| chat, T = 1 | 1.00 [1.00-4.20], 100 | 1.00 [1.00-1.00], 50 |"
    # (2 · 3 · 2.1 · 0.5)^(1/4); the standard error is that of the logarithms: 0.790 / 2
    assert tables["against without"] == ["| T = 1 | 1.584 ± 0.626 (4) | 1.000 ± 0.693 (2) |"]
    # (2 · 3 · 0.5 · 0.5)^(1/4), 0.932 / 2
    assert tables["against forbidden"] == ["| T = 1 | 1.107 ± 0.516 (4) | 1.000 ± 0.693 (2) |"]


def test_busy_streams_have_tables_of_their_own() -> None:
    runs = [run("chat", 4, 50.0, 40.0, 50.0) | {"busy": {"without": 60.0, "with": 90.0, "forbidden": 60.0}}]
    tables = {name: table.splitlines()[2:] for name, table in tables_of(runs).items()}
    assert tables["with, busy"] == ["| chat, T = 1 | 1.50 [1.50-1.50], 90 |"]
    assert tables["with"] == ["| chat, T = 1 | 0.80 [0.80-0.80], 40 |"]
    assert list(tables_of([*runs, run("chat", 4, 1.0, 1.0, 1.0)])) == [name for name in tables if "busy" not in name]


def test_cells_below_a_ratio_are_found_by_the_median_of_busy_streams() -> None:
    def measured(kind: str, ratio: float) -> dict[str, Any]:
        return run(kind, 4, 50.0, 90.0, 50.0) | {"busy": {"without": 100.0, "with": 100.0 * ratio, "forbidden": 100.0}}

    results = [measured("chat", ratio) for ratio in (0.99, 0.5, 0.96)] + [measured("code", r) for r in (0.5, 1.0, 1.0)]
    assert weak_cells(results, 0.98) == [(1.0, "chat", 4)]
    assert weak_cells(results, 0.95) == []


def test_streams_are_busy_until_one_has_nothing_left_to_begin() -> None:
    whole = Answer("abcdef", 3, [(1.0, 2), (2.0, 6)])
    late = Answer("abcdefgh", 4, [(1.5, 2), (2.5, 4), (3.5, 8)])
    loaded = Load([whole, late], began=0.0, first_idle=2.0, ended=3.5)
    assert loaded.speed == pytest.approx(7 / 3.5)
    assert loaded.busy_speed == pytest.approx((3 + 4 * 2 / 8) / 2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_prompts_of_a_round_are_alike(kind: str) -> None:
    assert len({KINDS[kind](index) for index in range(PROMPTS_OF_A_ROUND)}) == PROMPTS_OF_A_ROUND
