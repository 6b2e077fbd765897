"""Chains of guesses behind sequences while heads make them."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_

from shared.engine.proposer import Ask, Draft

LEAST_REACH = 0.35
"""A chain that is less likely right so far is not guessed on: a guess and its row cost a tenth of a step and more."""


class GuessChain:
    """The guesses after one sequence. `reach` is how likely they are all right, as far as the heads know."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.tokens: tuple[int, ...] = ()
        self.confidences: tuple[float, ...] = ()
        self.reach = 1.0
        self._is_stuck = False

    @property
    def last(self) -> int:
        """The token to guess on from."""
        return self.tokens[-1] if self.tokens else self.ask.sequence.tokens[-1]

    @property
    def num_left(self) -> int:
        """Guesses that are still wanted."""
        return self.ask.max_tokens - len(self.tokens)

    @property
    def goes_on(self) -> bool:
        return self.num_left > 0 and self.reach > LEAST_REACH and not self._is_stuck

    @property
    def draft(self) -> Draft:
        return Draft(self.tokens, self.confidences)

    def extend(self, tokens: Sequence_[int], sureness: Sequence_[float]) -> None:
        """With more guesses; a chain that gets none is over."""
        self.tokens += tuple(tokens)
        self.confidences += tuple(sureness)
        for probability in sureness:
            self.reach *= probability
        self._is_stuck = not tokens
