"""`slipstream ps`: the table of live workers."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from services.cli.ps import table_of
from shared.protocol.messages import WorkerBeat

_WORKER = "prefill-c87477dfb614"


def _printed(beat: WorkerBeat, width: int) -> str:
    out = StringIO()
    Console(file=out, width=width).print(table_of([beat]))
    return out.getvalue()


def _beat(**fields: object) -> WorkerBeat:
    values: dict[str, object] = {"role": "prefill", "state": "ready", "model": "smollm2", "numerics": "", "layout": ""}
    return WorkerBeat(_WORKER, **(values | fields))  # type: ignore[arg-type]  # the fields of the dataclass by name


def test_one_line_a_worker_where_there_is_room() -> None:
    beat = _beat(
        running=2,
        waiting=1,
        kv_tokens=200,
        kv_tokens_used=50,
        tokens_per_second=12.34,
        requests_done=9,
        generated_tokens=30,
        sequence_steps=20,
    )
    row = _printed(beat, 200).splitlines()[1]
    assert row.split() == [_WORKER, "prefill", "smollm2", "ready", "2", "1", "25", "%", "12.3", "1.50", "9"]


@pytest.mark.parametrize("width", [80, 60])
def test_narrow_terminals_fold_the_id_and_cut_nothing_of_it(width: int) -> None:
    lines = _printed(_beat(), width).splitlines()
    column = "".join(line.split(" ")[0] for line in lines)  # a folded line goes on in the first column
    assert column.removeprefix("worker") == _WORKER


def test_loading_shows_how_far_and_no_kv_room_is_no_use() -> None:
    row = _printed(_beat(state="loading", progress=0.42), 200)
    assert "loading 42%" in row
    assert "0 %" in row
