"""What a guess costs a proposer whose guesses are computed: learned while it works."""

from __future__ import annotations

import math

_FIRST_SECONDS = 0.0003
_GROWTH = 0.5
"""Before it is known what a step costs, and how it grows with the sequences in it."""

_FIRST_TOKEN_SECONDS = 0.0001
"""The same for a token that is read."""

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
        self._seconds[num_sequences] = _learned(self._seconds.get(num_sequences, seconds), seconds)


class ReadingPace:
    """Seconds of the proposer's model for texts that it reads, as long as their tokens are many."""

    def __init__(self) -> None:
        self._token_seconds = _FIRST_TOKEN_SECONDS

    def seconds(self, num_tokens: int) -> float:
        return num_tokens * self._token_seconds

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step with so many tokens took so long."""
        self._token_seconds = _learned(self._token_seconds, seconds / num_tokens)


def _learned(known: float, observed: float) -> float:
    change = min(observed, 3 * known) - known
    return known + change * (_FALLING if change < 0 else _RISING)
