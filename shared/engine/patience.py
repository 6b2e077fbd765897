"""When to look for guesses again: looking takes time, and there are texts where nothing comes of it."""

from __future__ import annotations

from shared.engine.draft_lengths import WORTHWHILE_GAIN

_LONGEST_REST, _LARGE_STEP, _LONGEST_REST_OF_LARGE = 8, 8, 16
"""Steps without a look, and those of so many sequences and more: a look takes longer there, and guesses gain less."""


class Patience:
    """After looks of no use the next ones come later and later. All sequences rest together: what guesses are worth
    depends on how many there are in a step, and a look has costs that are not by sequence."""

    def __init__(self) -> None:
        self._steps_left = 0
        self._next_rest = 1

    def rests(self) -> bool:
        """Whether nobody is asked in this step. To be called once in each step that could have guesses."""
        self._steps_left -= 1
        return self._steps_left >= 0

    def looked(self, num_sequences: int, num_computed: int, num_right: int) -> None:
        """Of the guesses in a step of so many sequences so many were computed, and so many would have begun right."""
        if num_computed or num_right >= WORTHWHILE_GAIN * num_sequences:
            self._steps_left, self._next_rest = 0, 1
        else:
            longest = _LONGEST_REST if num_sequences < _LARGE_STEP else _LONGEST_REST_OF_LARGE
            self._steps_left, self._next_rest = self._next_rest, min(2 * self._next_rest, longest)
