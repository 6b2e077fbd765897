"""When a proposer that is not worth its time is tried all the same: else nobody would notice that it would pay now."""

from __future__ import annotations

_EVERY = 24
"""Steps between two trials, at least."""

_SHARE = 0.01
"""Of all time goes to trials, at most."""


class Trials:
    """One proposer's. The first is due at once."""

    def __init__(self) -> None:
        self._num_steps = _EVERY - 1
        self._owed_s = 0.0

    def are_due(self, step_s: float) -> bool:
        """To be asked once in each step in which the proposer is not worth its time; the step takes about `step_s`."""
        self._num_steps += 1
        self._owed_s -= _SHARE * step_s
        return self._num_steps >= _EVERY and self._owed_s <= 0.0

    def made(self, seconds: float) -> None:
        """There was one, and it took so long."""
        self._num_steps = 0
        self._owed_s = seconds

    def not_needed(self) -> None:
        """The proposer was asked because it pays."""
        self._num_steps = 0
