"""When to look for guesses at all: looking takes time, and there are texts and loads where nothing comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.engine.sequence import Sequence

_LONGEST_REST = 8
"""Steps a sequence is not asked about after guesses of no use."""

_SHARE = 0.005
"""Of all time goes to looking in vain, at most."""

_FREE_LOOKS = 8
"""In vain, after one that was of use, before that time is counted: texts that repeat themselves do so with breaks."""

_MOST_SELDOM = 32
"""Steps between two looks, at most: one long look, which something disturbed, must not end all others."""


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
    """A sequence whose guesses were of no use is asked about less often, and looking has a share of the time.

    So guesses that never come right cost the share, whatever a look takes beside a step: that grows with the sequences,
    and with their number falls what a guess can gain.
    """

    _rests: dict[Sequence, _Rest] = field(default_factory=dict)
    _num_vain: int = 0
    _owed_s: float = 0.0
    _step_s: float = 0.0

    def pauses(self) -> bool:
        """Whether a step goes without a look, because those before found nothing and their time is not paid back."""
        return self._owed_s > 0.0

    def passed(self, seconds: float) -> None:
        """A step took so long, which pays for looks."""
        self._step_s = seconds
        self._owed_s = max(0.0, self._owed_s - _SHARE * seconds)

    def looked(self, seconds: float) -> None:
        """This step's look took so long, without what has a price; `found_use` follows unless it was in vain."""
        self._num_vain += 1
        if self._num_vain > _FREE_LOOKS:
            self._owed_s = min(seconds, _MOST_SELDOM * _SHARE * self._step_s)

    def found_use(self) -> None:
        """Of a guess that was computed at least half was right."""
        self._num_vain, self._owed_s = 0, 0.0

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
