"""The tables of the speculation benchmark say what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.speculation import PROMPTS_OF_A_ROUND, tables_of
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


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_prompts_of_a_round_are_alike(kind: str) -> None:
    assert len({KINDS[kind](index) for index in range(PROMPTS_OF_A_ROUND)}) == PROMPTS_OF_A_ROUND
