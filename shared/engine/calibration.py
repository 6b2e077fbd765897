"""Measures what steps cost on this machine, while the engine has nothing else to do: once, a step at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator

from shared.engine.batch import build_step
from shared.engine.draws import plan_draws
from shared.engine.runner import Runner
from shared.engine.scheduler import Scheduled
from shared.engine.sequence import Sequence
from shared.engine.step_costs import StepCosts
from shared.kv.block_manager import BlockManager
from shared.protocol.sampling import SamplingParams

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
_CONTEXT = 192
NUM_POSITIONS = _CONTEXT + ROWS[-1]
"""What a model must have for its steps to be measured."""

_PASSES = 3
_REPEATS, _ENOUGH_S = 5, 0.025
"""The fastest of some steps counts, of each pass: a core that was asleep, or lent to others, is slow for a while."""

_SLOW_S = 0.25
"""Where a step takes so long, larger ones are not measured."""


class Calibration:
    """Fills `tables`, one for each number of cores the runner may have. Lives on the engine thread."""

    def __init__(
        self, tables: dict[int, StepCosts], runner: Runner, blocks: BlockManager, block_size: int, max_rows: int
    ) -> None:
        self._tables = tables
        self._runner = runner
        self._blocks = blocks
        self._block_size = block_size
        self._rows = [rows for rows in ROWS if rows <= max_rows]
        self._work = self._measurements()

    def advance(self) -> bool:
        """Measure steps of one size; False when there is nothing left to measure."""
        return next(self._work, None) is not None

    def _measurements(self) -> Iterator[bool]:
        for num_cores in _powers_of_two(self._runner.max_cores):
            best: dict[int, float] = {}
            for _ in range(_PASSES):
                for rows in self._rows:
                    while (measured := self._measure(rows, num_cores)) is None:
                        yield True
                    best[rows] = min(measured, best.get(rows, measured))
                    yield True
                    if measured > _SLOW_S:
                        break
            self._tables[num_cores] = StepCosts(list(best), list(best.values()))

    def _measure(self, num_rows: int, num_cores: int) -> float | None:
        """Seconds of the fastest of some steps; None when other workers computed beside it, or no blocks are free."""
        needed = -(-(_CONTEXT + num_rows) // self._block_size)
        if not self._blocks.can_allocate(needed) or self._runner.num_cores < self._runner.max_cores:
            return None
        blocks = self._blocks.allocate(needed)
        try:
            plan = [_row(blocks, _CONTEXT + index) for index in range(num_rows)]
            step, draws = build_step(plan, self._block_size), plan_draws(plan)
            times: list[float] = []
            while len(times) < _REPEATS and sum(times) < _ENOUGH_S:
                began = time.perf_counter()
                self._runner.run(step, draws, num_cores)
                times.append(time.perf_counter() - began)
        finally:
            self._blocks.release(blocks)
        return min(times) if self._runner.num_cores == self._runner.max_cores else None


def _row(blocks: list[int], position: int) -> Scheduled:
    """A decode step of a sequence that has `position` tokens behind it; all of them read the same blocks."""
    params = SamplingParams(max_tokens=1, seed=position)
    sequence = Sequence("calibration", params, [0] * (position + 1), position + 1, (0,), b"")
    sequence.block_ids, sequence.num_computed = blocks, position
    return Scheduled(sequence, 1)


def _powers_of_two(most: int) -> list[int]:
    powers = [1]
    while powers[-1] * 2 < most:
        powers.append(powers[-1] * 2)
    return [*powers, most] if most > 1 else powers
