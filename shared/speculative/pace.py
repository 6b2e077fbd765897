"""What a guess costs a proposer whose guesses are computed: learned while it works."""

from __future__ import annotations

import math

_FIRST_SECONDS = 0.0003
_GROWTH = 0.5
"""Before it is known what a step costs, and how it grows with the sequences in it."""

_FALLING, _RISING = 0.5, 0.05
"""A quicker step counts for more than a slower one: the first ones are slow, and others were disturbed from outside."""


class Pace:
    """Seconds of one step of the proposer's model by the number of sequences in it."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def seconds(self, num_sequences: int) -> float:
        """As observed for the nearest number of sequences."""
        if not num_sequences:
            return 0.0
        if num_sequences in self._seconds:
            return self._seconds[num_sequences]
        if not self._seconds:
            return _FIRST_SECONDS * math.pow(num_sequences, _GROWTH)
        nearest = min(self._seconds, key=lambda known: abs(known - num_sequences))
        return self._seconds[nearest] * math.pow(max(1.0, num_sequences / nearest), _GROWTH)

    def observe(self, num_sequences: int, seconds: float) -> None:
        """A step with so many sequences took so long."""
        known = self._seconds.setdefault(num_sequences, seconds)
        change = min(seconds, 3 * known) - known
        self._seconds[num_sequences] = known + change * (_FALLING if change < 0 else _RISING)
