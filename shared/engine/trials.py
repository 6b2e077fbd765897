"""When a proposer that is not worth its time is tried all the same: else nobody would notice that it would pay now."""

from __future__ import annotations

_EVERY = 48
"""Steps between two trials, at least."""

_SHARE = 0.005
"""Of all time goes to trials, at most."""


class Trials:
    """One proposer's. The first is due at once."""

    def __init__(self) -> None:
        self._num_steps = _EVERY
        self._owed_s = 0.0

    def passed(self, seconds: float) -> None:
        """A step took so long, with the proposer or without."""
        self._num_steps += 1
        self._owed_s -= _SHARE * seconds

    def are_due(self) -> bool:
        """To be asked where the proposer is not worth its time."""
        return self._num_steps >= _EVERY and self._owed_s <= 0.0

    def made(self, seconds: float) -> None:
        """There was one, and it took so long."""
        self._num_steps = 0
        self._owed_s = seconds

    def not_needed(self) -> None:
        """The proposer was asked because it pays."""
        self._num_steps = 0
