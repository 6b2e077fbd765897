"""How much of each guess to compute: what makes tokens come fastest, by estimated chances and costs."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from functools import cached_property

from shared.engine.step_costs import StepCosts

WORTHWHILE_GAIN = 0.08
"""Expected gain below which a step goes without guesses: choosing by noisy estimates picks what was overestimated."""

_LEAST_GAIN = 0.02
"""Places that add less are not weighed."""

_SUREST, _SUREST_LENGTH = 0.98, 8
"""What is not worth it with such chances is not worth asking for."""

_LONGEST_STEP = 2.5
"""Times a step without guesses: more tokens a second are not worth it that streams stand still and come in gulps."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Estimated chances of a draft's tokens one after the other, each given those before."""

    chances: Sequence_[float]

    def gains(self) -> list[float]:
        """Expected tokens that each place adds: the chance that all up to it are right."""
        return list(itertools.accumulate(self.chances, operator.mul))


def choose_lengths(
    chains: Sequence_[Chain],
    num_tokens: int,
    seconds: Callable[[int], float],
    guessing: Callable[[int], float] | None = None,
) -> list[int]:
    """How much of each chain to compute, so that expected tokens per second are most.

    `num_tokens` come of the step anyway. `seconds` are those of the step with so many guesses in it, `guessing` those
    of making one more guess for each of so many sequences; None where that costs nothing. Places are taken in order of
    what they add: within a chain that falls, so a place never comes before the one it depends on.
    """
    places = [
        (gain, -place, index)
        for index, chain in enumerate(chains)
        for place, gain in enumerate(chain.gains())
        if gain >= _LEAST_GAIN
    ]
    places.sort(reverse=True)
    at_place = [0] * max((1 - place for _, place, _ in places), default=0)
    best, best_rate, expected, spent = 0, (1 + WORTHWHILE_GAIN) * num_tokens / seconds(0), float(num_tokens), 0.0
    for count, (gain, place, _) in enumerate(places, start=1):
        expected += gain
        if guessing is not None:
            spent += guessing(at_place[-place] + 1) - guessing(at_place[-place])
            at_place[-place] += 1
        rate = expected / (seconds(count) + spent)
        if rate > best_rate:
            best, best_rate = count, rate
    lengths = [0] * len(chains)
    for _, _, index in places[:best]:
        lengths[index] += 1
    return lengths


class PlainStep:
    """A step as planned, without guesses: `num_rows` rows of at most `max_rows`, one token for each sequence.

    Costs are those of when it was made: steps are chosen one after the other, and costs change slowly.
    """

    def __init__(self, costs: StepCosts, num_rows: int, num_sequences: int, max_rows: int) -> None:
        self.num_rows = num_rows
        self.num_sequences = num_sequences
        self.model_seconds = costs.step(num_rows)
        """Estimated, in the model."""
        self.seconds = costs.whole(num_rows)
        """With what comes beside the model."""
        self._costs = costs
        self._max_guesses = max_rows - num_rows
        self._longer = [self.model_seconds]

    @property
    def token_seconds(self) -> float:
        """What one token takes."""
        return self.seconds / self.num_sequences

    @property
    def row_seconds(self) -> float:
        """What one more row adds."""
        return self.with_guesses(1) - self.model_seconds

    def with_guesses(self, num_guesses: int) -> float:
        """Estimated seconds in the model with so many guesses in it."""
        while len(self._longer) <= num_guesses:
            self._longer.append(self._costs.larger_step(self.num_rows + len(self._longer), self.num_rows))
        return self._longer[num_guesses]

    def lengths(self, chains: Sequence_[Chain], guessing: Callable[[int], float] | None = None) -> list[int]:
        """How much of each chain to compute in this step; `guessing` as in `choose_lengths`."""
        longest, beside = _LONGEST_STEP * self.seconds, self.seconds - self.model_seconds

        def seconds(num_guesses: int) -> float:
            if num_guesses > self._max_guesses:
                return math.inf
            whole = self.with_guesses(num_guesses) + beside
            return whole if whole <= longest else math.inf

        return choose_lengths(chains, self.num_sequences, seconds, guessing)

    @cached_property
    def can_pay(self) -> bool:
        """Whether the surest guesses of any length would: else nobody is asked."""
        return any(self.lengths([Chain([_SUREST] * _SUREST_LENGTH)] * self.num_sequences))
