"""What a step costs by its number of rows, measured when a worker starts and corrected as it runs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_MEMORY = 0.95
_OUTLIER = 3.0
"""A step so many times its estimate was disturbed from outside and teaches nothing."""


class StepCosts:
    """Seconds of a step of `rows[i]` rows; between two of them linear, beyond the last in proportion.

    `beside` is what a step takes outside the model, as observed, paid once whatever number of tokens comes of it.
    """

    def __init__(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        self._rows = list(rows)
        self._seconds = _rising(seconds)
        self.beside = 0.0
        self._table: list[float] = []

    def step(self, num_rows: int) -> float:
        """Estimated seconds of a step of `num_rows` ≥ 1 rows in the model."""
        if num_rows < len(self._table):
            return self._table[num_rows]
        return self._interpolate(num_rows)

    def whole(self, num_rows: int) -> float:
        """The same with what comes beside the model."""
        return self.step(num_rows) + self.beside

    def observe_beside(self, seconds: float) -> None:
        """The time between the end of one step in the model and the beginning of the next one."""
        if self.beside and seconds > _OUTLIER * self.beside + 1e-3:
            return
        self.beside = self.beside * _MEMORY + seconds * (1 - _MEMORY) if self.beside else seconds

    def _interpolate(self, num_rows: int) -> float:
        rows, seconds = self._rows, self._seconds
        at = bisect_left(rows, num_rows)
        if at == len(rows):
            return seconds[-1] * num_rows / rows[-1]
        if at == 0:
            return seconds[0]
        share = (num_rows - rows[at - 1]) / (rows[at] - rows[at - 1])
        return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])


def _rising(seconds: Sequence[float]) -> list[float]:
    """Measured times with their noise taken out as far as is certain: more rows never cost less."""
    rising: list[float] = []
    for value in reversed(seconds):
        rising.append(min(value, rising[-1]) if rising else value)
    return rising[::-1]
