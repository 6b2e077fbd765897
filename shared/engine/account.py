"""What guessing took and what it gave: in debt it pauses, until a share of the time has paid for it."""

from __future__ import annotations

import math

_SHARE = 0.002
"""Of all time may go to guesses that give nothing back."""

_CREDIT_STEPS, _CREDIT_TOKENS = 3.0, 8.0
"""So much is kept of what was gained, in steps' time and in tokens' time, whichever is less. Of guesses that pay well
some are wrong ten times in a row, which takes one sequence some two steps' time; of many sequences some always have
luck. What is kept is lost each time that another kind of text begins, for which guesses do not pay."""

_MOST_SELDOM = 64
"""Steps of a pause, at most: no debt, be it of a step that something disturbed, ends guessing for good."""


class Account:
    """One proposer's. The estimates that guesses are chosen by may be wrong; this one counts what came of them.

    A new one has that credit. Seconds throughout.
    """

    def __init__(self) -> None:
        self._balance = math.inf
        self._step = self._credit = 0.0

    def is_overdrawn(self) -> bool:
        """Whether a step that begins goes without guesses."""
        if self._step:
            self._balance = max(self._balance, -_MOST_SELDOM * _SHARE * self._step)
            self._balance = min(self._balance, self._credit)
        return self._balance < 0.0

    def passed(self, seconds: float, num_sequences: int) -> None:
        """A step of so many sequences took so long, with guesses or without."""
        self._step = seconds
        self._credit = min(_CREDIT_STEPS, _CREDIT_TOKENS / num_sequences) * seconds
        self._balance += _SHARE * seconds

    def took(self, seconds: float) -> None:
        """Looking for guesses, making them, or computing them beside what a step computes anyway."""
        self._balance -= seconds

    def gave(self, seconds: float) -> None:
        """As long the tokens that were guessed right would have taken."""
        self._balance += seconds
