"""Which sequences are asked about: looking takes time, and there are texts where nothing comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.engine.sequence import Sequence

_LONGEST_REST = 8
"""Steps a sequence is not asked about after guesses of no use."""


@dataclass(slots=True)
class _Rest:
    """Steps that a sequence is left alone from now on, and the next time."""

    steps: int = 0
    next: int = 1

    def is_over(self) -> bool:
        self.steps -= 1
        return self.steps < 0

    def begin(self) -> None:
        self.steps, self.next = self.next, min(2 * self.next, _LONGEST_REST)


@dataclass(slots=True)
class Patience:
    """A sequence whose guesses were of no use is asked about less often."""

    _rests: dict[Sequence, _Rest] = field(default_factory=dict)

    def rests(self, sequence: Sequence) -> bool:
        """Whether a sequence is left alone in this step. To be asked once a step."""
        rest = self._rests.get(sequence)
        return rest is not None and not rest.is_over()

    def helped(self, sequence: Sequence) -> None:
        """Its guess was computed, or would have been right."""
        self._rests.pop(sequence, None)

    def missed(self, sequence: Sequence) -> None:
        """There was no guess for it, or a wrong one that was not worth computing."""
        self._rests.setdefault(sequence, _Rest()).begin()

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended. May be repeated."""
        self._rests.pop(sequence, None)
