"""What a step costs by its number of rows, measured when a worker starts and corrected as it runs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_MEMORY = 0.95
_OUTLIER = 2.5
"""A step so many times its estimate was disturbed from outside and teaches little."""

_FIRST_BESIDE_S = 0.005
_MUCH_LESS = 0.25
"""The first times beside the model may be waits for the first requests. Too large an estimate makes guesses look worth
their rows that are not, so it starts low and leaves what was far off quickly.
"""

_OWN_WEIGHT = 8.0
"""So many steps of one size outweigh what steps of all sizes tell about it."""


class _Ratio:
    """Observed over estimated seconds, the latest counting most."""

    def __init__(self) -> None:
        self.value = 1.0
        self.weight = 0.0

    def observe(self, ratio: float) -> None:
        self.weight = min(self.weight * _MEMORY + 1.0, 1.0 / (1.0 - _MEMORY))
        self.value += (ratio - self.value) / self.weight


class StepCosts:
    """Seconds of a step of `rows[i]` rows; between two of them linear, beyond the last in proportion.

    Contexts grow and other work shares the machine, so what steps take is compared with the table: by size, and for
    sizes that were hardly seen by all sizes. `beside` is what a step takes outside the model, as observed, paid once
    whatever number of tokens comes of it.
    """

    def __init__(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        self._rows = list(rows)
        self._seconds = _rising(seconds)
        self._all = _Ratio()
        self._own: dict[int, _Ratio] = {}
        self.beside = 0.0

    def step(self, num_rows: int) -> float:
        """Estimated seconds of a step of `num_rows` ≥ 1 rows in the model."""
        return self._measured(num_rows) * self._ratio(num_rows, usual=self._all.value)

    def whole(self, num_rows: int) -> float:
        """The same with what comes beside the model."""
        return self.step(num_rows) + self.beside

    def larger_step(self, num_rows: int, than: int) -> float:
        """Estimated seconds of a step that would run now in place of one of `than` < `num_rows` rows; never less.

        What disturbs the one would disturb the other: a size that was hardly seen goes by `than`, not by all sizes.
        """
        ratio = self._ratio(num_rows, usual=self._ratio(than, usual=self._all.value))
        return max(self.step(than), self._measured(num_rows) * ratio)

    def observe_step(self, num_rows: int, seconds: float) -> None:
        """A step of so many rows, all of them sampled, took this long in the model."""
        ratio = min(seconds / self._measured(num_rows), _OUTLIER * self._all.value)
        self._all.observe(ratio)
        self._own.setdefault(num_rows, _Ratio()).observe(ratio)

    def observe_beside(self, seconds: float) -> None:
        """The time between the end of one step in the model and the beginning of the next one."""
        if not self.beside:
            self.beside = min(seconds, _FIRST_BESIDE_S)
            return
        change = min(seconds, _OUTLIER * self.beside + 1e-3) - self.beside
        self.beside += change * (0.5 if seconds < _MUCH_LESS * self.beside else 1 - _MEMORY)

    def _ratio(self, num_rows: int, usual: float) -> float:
        """What steps of this size take of what was measured, by `usual` as far as they were hardly seen."""
        own = self._own.get(num_rows)
        if own is None:
            return usual
        share = own.weight / (own.weight + _OWN_WEIGHT)
        return share * own.value + (1 - share) * usual

    def _measured(self, num_rows: int) -> float:
        rows, seconds = self._rows, self._seconds
        at = bisect_left(rows, num_rows)
        if at == len(rows):
            return seconds[-1] * num_rows / rows[-1]
        if at == 0 or rows[at] == num_rows:
            return seconds[at]
        share = (num_rows - rows[at - 1]) / (rows[at] - rows[at - 1])
        return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])


def _rising(seconds: Sequence[float]) -> list[float]:
    """Measured times with their noise taken out as far as is certain: more rows never cost less."""
    rising: list[float] = []
    for value in reversed(seconds):
        rising.append(min(value, rising[-1]) if rising else value)
    return rising[::-1]
