"""What a step costs by its number of rows, and so what guesses can gain at best.

    python -m benchmarks.row_costs --starts 9 --out docs/data/row-costs.json

Each start is a process of its own that loads the model and measures its steps as a decode worker does before it
guesses. From the medians of all starts follows how many times as many tokens a second the best number of guesses would
give, where each of them is right with a chance of its own and making them costs nothing: a bound, for they do cost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from benchmarks.raw import write_raw
from shared.config import EngineSettings, SpeculationSettings
from shared.engine.calibration import ROWS
from shared.engine.step_costs import StepCosts
from shared.model.source import resolve
from shared.worker.build import build_engine

SEQUENCES = (1, 2, 4, 8, 16, 32)
CHANCES = (1.0, 0.7, 0.5, 0.37)
"""The last one is that of the shipped draft in chats at temperature 1."""

MOST_GUESSES = 8
"""For one sequence, in one step."""

Table = dict[int, float]
"""Seconds by rows."""


def measured(model: str) -> Table:
    """On all cores that one worker of a machine may have; sizes too slow to be measured are in proportion."""
    speculation = SpeculationSettings()
    built = build_engine(
        resolve(model), EngineSettings(), prefill_share=0.5, shared_cache=False, speculation=speculation
    )
    while built.engine.calibrate():
        pass
    assert built.engine.speculation is not None
    tables = built.engine.speculation.tables
    return {rows: tables[max(tables)].step(rows) for rows in ROWS}


def best_gain(num_sequences: int, chance: float, seconds: Callable[[int], float]) -> float:
    """Tokens a second with the best number of guesses to those without, where a step takes so long by its rows."""
    expected, best = float(num_sequences), 1.0
    for guess in range(num_sequences * MOST_GUESSES):
        expected += chance ** (guess // num_sequences + 1)
        taken = seconds(num_sequences + guess + 1) / seconds(num_sequences)
        best = max(best, expected / num_sequences / taken)
    return best


def render_costs(tables: Sequence[Table]) -> str:
    """Milliseconds of a step by its rows: median of the starts, minimum and maximum."""
    rows = list(tables[0])
    found = [[1e3 * table[count] for table in tables] for count in rows]
    cells = [f"{median(times):.2f} [{min(times):.2f}-{max(times):.2f}]" for times in found]
    header = "| rows | " + " | ".join(map(str, rows)) + " |"
    return "\n".join([header, "| --- |" + " --- |" * len(rows), "| ms | " + " | ".join(cells) + " |"])


def render_gains(tables: Sequence[Table], beside_s: float) -> str:
    """What guesses can gain at most, by sequences in a step and the chance of each guess."""
    seconds = {rows: median([table[rows] for table in tables]) for rows in tables[0]}
    costs = StepCosts(list(seconds), list(seconds.values()))
    header = "| each right with chance | " + " | ".join(map(str, SEQUENCES)) + " |"
    lines = [header, "| --- |" + " --- |" * len(SEQUENCES)]
    for chance in CHANCES:
        gains = [best_gain(count, chance, lambda rows: costs.step(rows) + beside_s) for count in SEQUENCES]
        lines.append(f"| {chance:g} | " + " | ".join(f"{gain:.2f}" for gain in gains) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--starts", type=int, default=9)
    parser.add_argument("--beside-ms", type=float, default=1.5, help="what a step takes outside the model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help="measure in this process and print seconds by rows as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.model)))
        return
    tables = [_in_another_process(options.model) for _ in range(options.starts)]
    summary = {
        "milliseconds": render_costs(tables),
        "gains in the model alone": render_gains(tables, 0.0),
        f"gains with {options.beside_ms:g} ms beside it": render_gains(tables, 1e-3 * options.beside_ms),
    }
    runs = [{str(rows): seconds for rows, seconds in table.items()} for table in tables]
    write_raw(options.out, runs, **{name: text.splitlines() for name, text in summary.items()})
    print("\n\n".join(f"{name}:\n\n{text}" for name, text in summary.items()))


def _in_another_process(model: str) -> Table:
    command = [sys.executable, "-m", "benchmarks.row_costs", "--model", model, "--one"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {int(rows): seconds for rows, seconds in json.loads(printed.splitlines()[-1]).items()}


if __name__ == "__main__":
    main()
