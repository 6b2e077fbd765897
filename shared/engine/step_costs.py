"""What a step costs by its number of rows, measured when a worker starts and corrected as it runs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_MEMORY = 0.95
_OWN_MEMORY = 0.98
"""What disturbs steps comes and goes; how sizes differ does not."""

OUTLIER = 1.5
"""A step so many times its estimate was disturbed from outside and counts for no more."""

_OUTLIER_BESIDE = 2.5
_FIRST_BESIDE_S = 0.005
_MUCH_LESS = 0.25
"""The first times beside the model may be waits for the first requests. Too large an estimate makes guesses look worth
their rows that are not, so it starts low and leaves what was far off quickly.
"""

_OWN_WEIGHT = 8.0
"""So many steps of one size outweigh what was measured of it."""


class _Ratio:
    """Observed over estimated seconds, the latest counting most."""

    def __init__(self, memory: float) -> None:
        self.value = 1.0
        self.weight = 0.0
        self._memory = memory

    def observe(self, ratio: float) -> None:
        self.weight = min(self.weight * self._memory + 1.0, 1.0 / (1.0 - self._memory))
        self.value += (ratio - self.value) / self.weight


class StepCosts:
    """Seconds of a step of `rows[i]` rows; between two of them linear, beyond the last in proportion.

    Contexts grow and other work shares the machine, so what steps take is compared with the table: all sizes together,
    over some steps, and each size with all, over many. What disturbs the steps of now so makes all sizes dearer, also
    those that did not run meanwhile. `beside` is what a step takes outside the model, as observed, paid once whatever
    number of tokens comes of it.
    """

    def __init__(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        self._rows = list(rows)
        self._seconds = _rising(seconds)
        self._all = _Ratio(_MEMORY)
        self._own: dict[int, _Ratio] = {}
        self.beside = 0.0

    def step(self, num_rows: int) -> float:
        """Estimated seconds of a step of `num_rows` ≥ 1 rows in the model."""
        return self._usual(num_rows) * self._own_ratio(num_rows, usual=1.0)

    def whole(self, num_rows: int) -> float:
        """The same with what comes beside the model."""
        return self.step(num_rows) + self.beside

    def larger_step(self, num_rows: int, than: int) -> float:
        """Estimated seconds of a step that would run now in place of one of `than` < `num_rows` rows; never less.

        A size that was hardly seen is taken to differ from what was measured as `than` does.
        """
        ratio = self._own_ratio(num_rows, usual=self._own_ratio(than, usual=1.0))
        return max(self.step(than), self._usual(num_rows) * ratio)

    def observe_step(self, num_rows: int, seconds: float) -> None:
        """A step of so many rows, all of them sampled, took this long in the model."""
        ratio = min(seconds, OUTLIER * self.step(num_rows)) / self._measured(num_rows)
        self._all.observe(ratio / self._own_ratio(num_rows, usual=1.0))
        self._own.setdefault(num_rows, _Ratio(_OWN_MEMORY)).observe(ratio / self._all.value)

    def observe_beside(self, seconds: float) -> None:
        """The time between the end of one step in the model and the beginning of the next one."""
        if not self.beside:
            self.beside = min(seconds, _FIRST_BESIDE_S)
            return
        change = min(seconds, _OUTLIER_BESIDE * self.beside + 1e-3) - self.beside
        self.beside += change * (0.5 if seconds < _MUCH_LESS * self.beside else 1 - _MEMORY)

    def _usual(self, num_rows: int) -> float:
        """What was measured, by what steps of all sizes take of that now."""
        return self._measured(num_rows) * self._all.value

    def _own_ratio(self, num_rows: int, usual: float) -> float:
        """What steps of this size take against all, `usual` as far as they were hardly seen."""
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
