"""When to look for guesses at all: looking takes time, and there are texts and loads where nothing comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.engine.sequence import Sequence

_LONGEST_REST = 8
"""Steps a sequence is not asked about after guesses of no use."""

_VAIN_STEPS = 8
_SMALL_STEP = 4
_MOST_SELDOM = 32
"""Where no guess was of use for so many steps, steps larger than small ones look for guesses less and less often: at
last one in 4 of those with 8 sequences, one in 16 with 16, one in 32 with 23 and more. Looking costs by the sequence,
and the more there are the less a guess can gain; in a small step a guess missed is dearer than looking.
"""


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
    """A sequence whose guesses were of no use is asked about less often, and so is everybody in large steps."""

    _rests: dict[Sequence, _Rest] = field(default_factory=dict)
    _num_vain: int = 0

    def pauses(self, num_sequences: int) -> bool:
        """Whether a step goes without a look, because the ones before found nothing. To be asked once a step."""
        self._num_vain += 1
        every = min(self._num_vain // _VAIN_STEPS, num_sequences**2 // _SMALL_STEP**2, _MOST_SELDOM)
        return every > 1 and self._num_vain % every != 0

    def found_use(self) -> None:
        """Of a guess that was computed at least half was right."""
        self._num_vain = 0

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
